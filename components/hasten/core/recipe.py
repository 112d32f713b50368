"""Recipes: a candidate is the experiment's config with a list of overrides on top."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hasten.core.auto import from_the_machine, left_open, working_engines
from hasten.core.errors import ConfigError
from hasten.core.files import digest
from hasten.core.groups import GROUPS
from hasten.core.interfaces import Edit
from hasten.core.search import covering
from hasten.core.trial import Strategy

UNTOUCHED = ("student=same", "distillation=none", "pruning=none", "quantization=none", "engine=eager")
"""The edit that leaves the user's model as it is, in eager PyTorch."""

RESULT_SECTIONS = (
    "seed",
    "data",
    "task",
    "model",
    "student",
    "distillation",
    "pruning",
    "quantization",
    "engine",
    "target",
    "loader",
    "trainer",
    "distributed",
)
"""Sections that decide what a recipe gives. Tracking, callbacks, objective and planner never do."""

WALK_SECTIONS = (
    *("pipeline", "dry_run", "init", "launch", "run", "runs", "store", "sweep", "hparams_search", "ui"),
    *("tracking", "planner", "objective", "strategy", "space", "callbacks"),
)
"""Sections that say what to do with a recipe; they are no part of its overrides."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One candidate.

    Attributes:
        overrides: the normalised difference from the packaged experiment; a command line with it rebuilds the
            candidate.
        config: the composed config, resolved, as plain values.
    """

    overrides: tuple[str, ...]
    config: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """Equal for recipes that give the same result, however they are spelt."""
        sections = {section: self.config[section] for section in RESULT_SECTIONS}
        # How a result is judged is no part of it.
        task = {name: value for name, value in self.section("task").items() if name != "metrics"}
        return digest({**sections, "task": task})

    def section(self, name: str) -> Mapping[str, Any]:
        """Of a group, or a node within it by its dotted path; empty where that is null or not there."""
        group, *path = name.split(".")
        node: Any = self.config[group]
        for part in path:
            node = (node or {}).get(part)
        return node or {}

    def option(self, group: str) -> str:
        """What a group was set to, as the user calls it."""
        prefix = f"{group}="
        for text in self.overrides:
            if text.startswith(prefix):
                return text.removeprefix(prefix)
        target = str(self.section(group).get("_target_", ""))
        return target.rpartition(".")[0].rpartition(".")[2] or group


def normalise(overrides: Iterable[str], groups: Sequence[str] = GROUPS) -> tuple[str, ...]:
    """One spelling for one edit.

    Setting a group drops earlier overrides under it, the last value wins, and the result is sorted by group.

    Raises:
        ConfigError: an override does not parse.
    """
    kept: dict[str, str] = {}
    for text in overrides:
        override = _parse(text)
        key = override.key_or_group
        if key in groups:
            kept = {name: value for name, value in kept.items() if name != key and not name.startswith(f"{key}.")}
        kept.pop(key, None)
        kept[key] = _spell(override)
    return tuple(sorted(kept.values(), key=lambda text: _order(text, groups)))


def _order(text: str, groups: Sequence[str]) -> tuple[int, int, str]:
    key = text.lstrip("+~").partition("=")[0]
    group = key.partition(".")[0]
    return (groups.index(group) if group in groups else len(groups), 0 if key == group else 1, text)


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text!r} is not an override of the form key=value: {reason}") from error


def _spell(override: Override) -> str:
    prefix = {"ADD": "+", "FORCE_ADD": "++", "DEL": "~"}.get(override.type.name if override.type else "", "")
    key = override.get_key_element().lstrip("+~")
    if override.is_delete() and override.value() is None:
        return f"~{key}"
    return f"{prefix}{key}={override.get_value_element_as_str()}"


@dataclass(frozen=True, kw_only=True)
class Composer:
    """Composes recipes from the config that this process was started with.

    Attributes:
        base: the user's own overrides of recipe sections, normalised.
        walk: the user's overrides of the other sections (pipeline, store, tracking, ...), which every recipe shares.
    """

    base: tuple[str, ...]
    walk: tuple[str, ...]
    _composed: dict[tuple[str, ...], Recipe] = field(default_factory=dict, compare=False, repr=False)
    _described: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, overrides: Iterable[str]) -> Composer:
        mine: list[str] = []
        walk: list[str] = []
        # On a command line the order of `pruning=structured pruning.sparsity=0.3` does not matter; in an edit it does.
        choices_first = sorted(overrides, key=lambda text: _parse(text).key_or_group not in GROUPS)
        for text in normalise(choices_first):
            section = text.lstrip("+~").partition("=")[0].partition(".")[0]
            (walk if section in WALK_SECTIONS else mine).append(text)
        return cls(base=tuple(mine), walk=tuple(walk))

    def compose(self, overrides: Iterable[str] = ()) -> Recipe:
        """The user's own recipe with some overrides on top.

        Raises:
            ConfigError: an override names no key or option that there is; with the nearest one that there is.
        """
        return self._once(normalise([*self.base, *overrides]))

    def _once(self, overrides: tuple[str, ...]) -> Recipe:
        final = tuple(text for text in overrides if text not in self._defaults)
        if final not in self._composed:
            self._composed[final] = self._recipe(final)
        return self._composed[final]

    def edited(self, recipe: Recipe, edit: Iterable[str]) -> Recipe:
        """A recipe with an edit on top. A recipe's overrides are complete: the user's own don't come in again.

        Raises:
            ConfigError: as of `compose`.
        """
        return self._once(normalise([*recipe.overrides, *edit]))

    @cached_property
    def _defaults(self) -> frozenset[str]:
        """Group choices that go without saying, as overrides: those of the experiment, which has to be said itself."""
        chosen = [text for text in self.base if text.startswith(("experiment=", "debug="))]
        choices = compose(config_name="config", overrides=chosen, return_hydra_config=True).hydra.runtime.choices
        return frozenset(f"{group}={option}" for group, option in choices.items()) - frozenset(chosen)

    def _recipe(self, final: tuple[str, ...]) -> Recipe:
        config = self._config([*final, *self.walk])
        said = self._said_by_the_machine(config)
        for key, value in said.items():
            OmegaConf.update(config, key, value)
        missing = sorted({*_missing(OmegaConf.to_container(config, resolve=False)), *self._left_open(final, config)})
        if missing:
            raise ConfigError(*(f"{key} has no value and needs one: {key}=..." for key in missing))
        try:
            values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
        except OmegaConfBaseException as error:
            raise ConfigError(one_line(error)) from error
        assert isinstance(values, dict)
        # A recipe names all that it depends on: what the machine said is as good as typed.
        overrides = normalise([*final, *(f"{key}={_typed(value)}" for key, value in said.items())])
        return Recipe(overrides=overrides, config={str(key): value for key, value in values.items()})

    def setting(self, key: str) -> Any:
        """The value of a key in the user's own config, whatever else of it has no value yet.

        Raises:
            ConfigError: as of `compose`.
        """
        return OmegaConf.select(self._config([*self.base, *self.walk]), key)

    def typed(self, group: str) -> tuple[str, ...]:
        """Knobs of a group that the user typed."""
        keys = (text.lstrip("+~").partition("=")[0] for text in self.base)
        return tuple(key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}."))

    def settled(self, overrides: Iterable[str]) -> Composer:
        """The same user, who has typed these instead of what they replace."""
        return Composer(base=normalise([*self.base, *overrides]), walk=self.walk)

    def left_to_the_machine(self) -> tuple[str, ...]:
        """Overrides that say what the user's own recipe leaves to the machine at hand."""
        said = self._said_by_the_machine(self._config([*self.base, *self.walk]))
        return tuple(f"{key}={_typed(value)}" for key, value in said.items())

    def _said_by_the_machine(self, config: DictConfig) -> dict[str, Any]:
        """Dotted key -> value of what the target leaves open."""
        found = OmegaConf.to_container(config.target, resolve=False) if config.target else None
        target = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
        if not left_open(target):
            return {}
        if (known := digest(target)) not in self._described:
            said = from_the_machine(target)
            if "engines" in left_open(target):
                said["engines"] = working_engines(self._engines(config, {**target, **said}), {**target, **said})
            self._described[known] = {f"target.{key}": value for key, value in said.items()}
        return self._described[known]

    def _engines(self, config: DictConfig, target: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every option of the group with its node, as it is resolved beside a target; without those that can't be."""
        sections = OmegaConf.to_container(config, resolve=False)
        assert isinstance(sections, dict)
        for option in self.options("engine"):
            beside = OmegaConf.create({**sections, "target": target, "engine": self._spelt("engine", option)})
            try:
                node = OmegaConf.to_container(beside.engine, resolve=True)
            except OmegaConfBaseException:
                continue
            if isinstance(node, dict):
                yield option, {str(key): value for key, value in node.items()}

    def _left_open(self, final: tuple[str, ...], config: DictConfig) -> Iterator[str]:
        """Keys that the chosen experiment leaves to the user.

        The `null` of the group's own file would hide them, since OmegaConf merges no `???` over a value.
        """
        for text in final:
            if text.startswith("experiment="):
                found = _repository().load_config(f"experiment/{text.removeprefix('experiment=')}")
                raw = OmegaConf.to_container(found.config, resolve=False) if found else {}
                yield from (key for key in _missing(raw) if OmegaConf.select(config, key, default=None) is None)

    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies that the user named, or every one on the config search path that is meant for all.

        Raises:
            ConfigError: a strategy does not say what it needs to, or edits what there is not.
        """
        strategies = self.declared_strategies()
        if self._named_strategies is None:
            strategies = tuple(strategy for strategy in strategies if strategy.by_default)
        self._check_attempts(strategies)
        return strategies

    def declared_strategies(self) -> tuple[Strategy, ...]:
        """The strategies that the user named, or every one on the config search path, whatever they may try.

        Raises:
            ConfigError: a strategy does not say what it needs to.
        """
        names = self.options("strategy") if self._named_strategies is None else self._named_strategies
        config = self._config([*self.base, *self.walk, f"strategy=[{','.join(names)}]"])
        found = OmegaConf.to_container(config.strategies, resolve=True) if config.strategies else {}
        assert isinstance(found, dict)
        # An experiment may edit a strategy's file; where the user did not name that strategy, there is only the edit.
        unchosen = set(self.options("strategy")) - set(names)
        nodes = {name: node for name, node in found.items() if name not in unchosen}
        if unpackaged := [name for name in names if name not in nodes]:
            missing = (
                f"strategy/{name}.yaml needs the first line: # @package strategies.{name}" for name in unpackaged
            )
            raise ConfigError(*missing)
        return tuple(_strategy(str(name), node) for name, node in sorted(nodes.items()))

    @property
    def _named_strategies(self) -> list[str] | None:
        named = [_parse(text).value() for text in self.walk if text.startswith("strategy=")]
        if not named:
            return None
        return [str(name) for name in (named[-1] if isinstance(named[-1], list) else named)]

    def _check_attempts(self, strategies: Sequence[Strategy]) -> None:
        """Every edit has to compose: as it is, where all the others' options were chosen before it, or at least with
        some option of the group whose knob it sets, which the user's recipe may not have.

        The loop asks for most of them as they are, so that composing them costs nothing more.
        """
        edits = [(strategy, edit) for strategy in strategies for edit in _covering(strategy)]
        choices = [text for _, edit in edits for text in edit if text.partition("=")[0] in GROUPS]
        for strategy, edit in edits:
            if self._composes(edit) or self._composes_somewhere(edit):
                continue
            try:
                self.compose([*choices, *edit])
            except ConfigError as error:
                raise ConfigError(f"strategies.{strategy.name}: {error}") from error

    def _composes(self, overrides: Sequence[str]) -> bool:
        try:
            self.compose(overrides)
        except ConfigError:
            return False
        return True

    def _composes_somewhere(self, edit: Edit) -> bool:
        groups = sorted({text.partition(".")[0] for text in edit} & set(GROUPS))
        return any(self._composes([f"{group}={option}", *edit]) for group in groups for option in self.options(group))

    def choices(self, recipe: Recipe) -> dict[str, str]:
        """Group -> the option that a recipe has of it."""
        config = compose(config_name="config", overrides=[*recipe.overrides, *self.walk], return_hydra_config=True)
        return {str(group): str(option) for group, option in config.hydra.runtime.choices.items()}

    def node(self, group: str, option: str, recipe: Recipe) -> Mapping[str, Any]:
        """What the file of an option spells, as it is resolved beside the other sections of a recipe.

        Raises:
            ConfigError: it does not compose, or refers to what there is not.
        """
        try:
            beside = OmegaConf.create({**recipe.config, group: self._spelt(group, option)})
            resolved = OmegaConf.to_container(beside, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, [f"{group}={option}"]) from error
        assert isinstance(resolved, dict)
        return resolved[group] or {}

    def _spelt(self, group: str, option: str) -> Any:
        found = _repository().load_config(f"{group}/{option}")
        if found and not found.defaults_list and not found.header.get("package"):
            return found.config  # composing a file that stands alone gives the same and takes ten times as long
        spelt = OmegaConf.to_container(compose(config_name=f"{group}/{option}"))
        assert isinstance(spelt, dict)
        return spelt.get(group)

    def options(self, group: str) -> list[str]:
        """Options of a group on the config search path."""
        return list(GlobalHydra.instance().config_loader().get_group_options(group))

    def _config(self, overrides: Sequence[str]) -> DictConfig:
        try:
            return compose(config_name="config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, overrides) from error
        except ValueError as error:  # Hydra's own for `group=null`
            raise ConfigError(f"{one_line(error)}: a group takes the name of an option, none for nothing") from error


def says_more(recipe: Recipe, text: str) -> bool:
    """Whether an override of a knob gives it another value than the recipe has."""
    override = _parse(text)
    node: Any = recipe.config
    for part in override.key_or_group.split("."):
        node = (node or {}).get(part)
    return bool(node != override.value())


def left_to_the_machine(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[str, ...]:
    """Overrides that say what these leave to the machine at hand (`target=auto`), before Hydra runs.

    Args:
        folders: the user's own, which are searched after the packaged one.

    Raises:
        ConfigError: the overrides name what there is not.
    """
    searched = [f"hydra.searchpath=[{','.join(f'file://{folder.absolute()}' for folder in folders)}]"]
    with _hydra():
        return Composer.of([*overrides, *(searched if folders else [])]).left_to_the_machine()


def _repository() -> Any:
    """The files on the config search path, before anything is composed of them."""
    return GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _missing(node: Any, key: str = "") -> Iterator[str]:
    """Keys that the config leaves to the user; not those that only repeat one of them by interpolation."""
    if node == "???":
        yield key
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _missing(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _missing(value, f"{key}[{place}]")


def _strategy(name: str, node: Any) -> Strategy:
    try:
        return Strategy(
            name=name,
            description=str(node.get("description", "")),
            addresses={str(key): float(value) for key, value in node["addresses"].items()},
            attempts=tuple(tuple(str(item) for item in attempt) for attempt in node["attempts"]),
            search=node["search"],
            cost=float(node["cost"]),
            outputs=node.get("outputs"),
            operators=_names(node, "operators"),
            by_default=_flag(node, "by_default", default=True),
            speeds=str(node.get("speeds", "requests")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wanted = "addresses, attempts, search and cost"
        raise ConfigError(f"strategy/{name}.yaml must spell {wanted}: {type(error).__name__}: {error}") from error


def _covering(strategy: Strategy) -> Sequence[Edit]:
    try:
        return covering(strategy)
    except ConfigError as error:
        raise ConfigError(*(f"strategies.{strategy.name}.{problem}" for problem in error.problems)) from error


def _flag(node: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = node.get(name, default)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def _names(node: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    value = node.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise TypeError(f"{name} must be a list of names or null, got {value!r}")
    return None if value is None else tuple(value)


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, config):
        name = f"{prefix}{key}"
        yield name
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if isinstance(config[key], DictConfig):
            yield from _keys(config[key], f"{name}.")


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's complaint as one line that names the key, what was given and the nearest that is allowed.

    Args:
        overrides: of the command that failed; its group choices decide which keys there are.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        allowed = [str(item) for item in error.options or ()]
        return ConfigError(
            f"{group}={option} is no option of {group}{nearest(option, allowed)}; there are {', '.join(allowed)}"
        )
    match = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and match:
        return _unknown_key(match[1], error, known_keys(overrides))
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    return ConfigError(one_line(cause))


def _unknown_key(key: str, error: ConfigCompositionException, keys: Sequence[str]) -> ConfigError:
    parent = key.rpartition(".")[0]
    siblings = [name for name in keys if name.rpartition(".")[0] == parent and not name.endswith("._target_")]
    if key in siblings:
        return ConfigError(f"{key}: {one_line(error.__cause__ or error)}")
    if not parent:
        return ConfigError(f"{key} is no key of the config{nearest(key, siblings)}; there are {', '.join(siblings)}")
    if parent in GROUPS and not siblings:
        return ConfigError(f"{key}: {parent} has no knobs as chosen; pick an option first, {parent}=...")
    there = f"; {parent} has {', '.join(name.rpartition('.')[2] for name in siblings)}" if siblings else ""
    return ConfigError(f"{key} is no key of the config{nearest(key, siblings or keys)}{there}")


def known_keys(overrides: Sequence[str]) -> list[str]:
    """All keys of the config, with the group choices among the overrides where they compose."""
    choices = [text for text in overrides if "=" in text and text.partition("=")[0] in GROUPS and "," not in text]
    with _hydra():
        try:
            config = compose(config_name="config", overrides=choices)
        except (HydraException, OmegaConfBaseException):
            config = compose(config_name="config")
    return list(_keys(config))


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra as it runs already, or, after it gave up on a command line, with the packaged configs."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
            yield


def one_line(error: BaseException) -> str:
    """The message without the indented details that Hydra and OmegaConf append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = {name: value for name, _, value in (line.partition(": ") for line in lines[1:])}
    where = f" ({details['full_key']})" if details.get("full_key") else ""
    return f"{lines[0] if lines else type(error).__name__}{where}"


def nearest(given: str, allowed: Sequence[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f", did you mean {matches[0]!r}?" if matches else ""


def rebuild_command(overrides: Sequence[str], config_dir: Path | None) -> str:
    """The command line that builds and measures this recipe again."""
    import shlex

    where = ["--config-dir", str(config_dir)] if config_dir else []
    return shlex.join(["hasten", *where, "run", *overrides])
