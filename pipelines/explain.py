"""`hasten explain`: what can be combined with what, and what one recipe does or why it is refused. It trains nothing.

All of it is read from what the components and the YAML files declare, so that techniques of the user's own are in it.
A recipe that makes no sense as a combination is what this is for: its reasons are printed and the exit code is 0. Only
values that are wrong by themselves end with 2, as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hasten.core.construct import construct, locate
from hasten.core.errors import ConfigError, HastenError
from hasten.core.groups import conf_folder, options
from hasten.core.interfaces import Engine, Task
from hasten.core.preflight import check_values, needed, refusals
from hasten.core.recipe import Composer, Recipe
from hasten.core.search import LEFT_OUT, covering
from hasten.core.trial import BOTTLENECKS, Strategy
from hasten.session import Session

TECHNIQUES = ("student", "distillation", "pruning", "quantization")
RELIEVED = {"student": ", ".join(BOTTLENECKS), "distillation": "lost quality"}
"""What a technique is for whose class declares no bottleneck."""
STAGES = {
    "data": "data",
    "teacher": "model",
    "student": "student",
    "prune": "pruning",
    "quantize": "quantization",
    "compile": "engine",
}
"""Stage -> the group whose option says what it does."""
FIXED = {
    "answers": "The outputs of what teaches on the training rows, which the distillation learns from",
    "assistant": "A network in between that learns first and then teaches: distillation.assistant",
    "assistant-answers": "The outputs of the assistant on the training rows",
    "export": "One graph for every engine",
}
"""What stages do that no group decides."""
TRAINS = ("student", "prune", "quantize")
"""Stages whose training takes the distillation's loss."""


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request with its values checked, whatever comes of their combination.

    Raises:
        ConfigError: an override names what there is not, or a value is out of its range.
    """
    composer = Composer.of(overrides)
    recipe = composer.compose()
    check_values(recipe)
    mine = config_folders[0] if len(config_folders) > 1 else None
    return Session(composer=composer, recipe=recipe, folder=folder, config_dir=mine)


def main(session: Session) -> int:
    """The command; its exit code."""
    guide, screen = Guide(session=session), session.screen
    screen.table("what techniques are for", ("technique", "relieves", "takes", "never with"), list(guide.techniques()))
    screen.table("what engines run", ("", *guide.engines), list(guide.matrix()))
    screen.lines(guide.reasons)
    screen.table("what tasks allow", ("task", "outputs", "trains", "distillation"), list(guide.tasks()))
    screen.table(guide.title, ("stage", "option", "what it does", "set otherwise"), list(guide.stages()))
    refused = guide.refused
    screen.lines(["refused:", *(f"  {reason}" for reason in refused)] if refused else ["accepted: it can be run"])
    edited = session.untouched if refused else session.recipe
    title = f"strategies on {'the untouched model' if refused else 'this recipe'}"
    screen.table(title, ("strategy", "addresses", "first try"), list(guide.strategies(edited)))
    return 0


@dataclass(frozen=True)
class Option:
    """One option of a group with what its class declares; `problem` says why it can't be used at all."""

    group: str
    name: str
    node: Mapping[str, Any]
    component: Any
    problem: str | None = None

    @property
    def title(self) -> str:
        return f"{self.group}={self.name}"

    @property
    def never_with(self) -> tuple[str, ...]:
        return tuple(getattr(self.component, "never_with", ()))


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What is to be told, as rows of text."""

    session: Session

    @property
    def composer(self) -> Composer:
        return self.session.composer

    @property
    def recipe(self) -> Recipe:
        return self.session.recipe

    @property
    def title(self) -> str:
        return f"this recipe: {' '.join(self.recipe.overrides) or 'the experiment as it is'}"

    def techniques(self) -> Iterator[tuple[str, str, str, str]]:
        """Every technique with what it relieves, takes, and can't be combined with."""
        for group in TECHNIQUES:
            for option in self._options[group]:
                if option.problem:
                    yield option.title, "", option.problem, ""
                elif option.name not in LEFT_OUT:
                    relieved = ", ".join(getattr(option.component, "relieves", ())) or RELIEVED.get(group, "")
                    yield option.title, relieved, self._taken(option), self._excluded(option)

    @cached_property
    def engines(self) -> dict[str, Option]:
        return {option.name: option for option in self._options["engine"]}

    def matrix(self) -> Iterator[tuple[str, ...]]:
        """Each option of quantization: `yes` or the number of a reason for every engine."""
        for option, cells in self._cells.items():
            yield (f"quantization={option}", *("yes" if not cell else f"no ({self._numbers[cell]})" for cell in cells))

    @property
    def reasons(self) -> list[str]:
        """What the numbers of the matrix stand for."""
        return [f"  ({number}) {reason}" for reason, number in self._numbers.items()]

    def tasks(self) -> Iterator[tuple[str, str, str, str]]:
        """What a task's outputs mean, whether anything can be trained for it, and which distillation fits."""
        distillations = [option for option in self._options["distillation"] if option.component]
        for option in self._options["task"]:
            task = option.component
            if option.problem or not (inspect.isclass(task) and issubclass(task, Task)):
                yield option.title, "", option.problem or "is no Task", ""
                continue
            fitting = [it.name for it in distillations if it.component.outputs in (None, task.outputs)]
            trains = "yes" if task.trains else "no: engines and quantization only"
            yield option.title, task.outputs, trains, ", ".join(fitting) if task.trains else ""

    def stages(self) -> Iterator[tuple[str, str, str, str]]:
        """The stages of the recipe in order: what each does, and which knobs differ from its option's file."""
        from hasten.stages.build import wanted

        choices = self.composer.choices(self.recipe)
        for stage in (each.name for each in wanted(self.recipe)):
            group = STAGES.get("teacher" if stage.startswith("teacher-") else stage)  # of several, each has a number
            if group is None:
                yield stage, "", FIXED.get(stage, ""), ""
                continue
            yield (
                stage,
                f"{group}={choices[group]}",
                self._purpose(group, choices[group]),
                self._changed(group, choices),
            )
            if (
                stage in TRAINS
                and self.recipe.section("distillation").get("_target_")
                and _trains(self.recipe.section(group))
            ):
                name = choices["distillation"]
                told = self._purpose("distillation", name)
                yield "", f"distillation={name}", told, self._changed("distillation", choices)
        aim = choices["objective"]
        yield "evaluate", f"objective={aim}", self._purpose("objective", aim), self._changed("objective", choices)

    @property
    def refused(self) -> list[str]:
        """Why the preflight refuses the recipe; empty where it accepts it."""
        return refusals(self.recipe)

    def strategies(self, recipe: Recipe) -> Iterator[tuple[str, str, str]]:
        """Every move of the loop: what it addresses, and what it would try first on a recipe, or why nothing."""
        for strategy in self.composer.declared_strategies():
            addresses = ", ".join(f"{name} {factor:g}x" for name, factor in strategy.addresses.items())
            named = "" if strategy.by_default else " (only where it is named)"
            yield f"{strategy.name}{named}", addresses, self._first_try(strategy, recipe)

    def _first_try(self, strategy: Strategy, recipe: Recipe) -> str:
        task = locate(recipe.section("task")["_target_"], "task")
        if strategy.outputs not in (None, task.outputs):
            return f"none: it is for outputs that are {strategy.outputs}, and the task's are {task.outputs}"
        reason: str | None = "it has no attempts"
        for edit in covering(strategy):
            reason = self._obstacle(recipe, edit)
            if reason is None:
                return " ".join(edit)
        return f"none: {reason}"

    def _obstacle(self, recipe: Recipe, edit: Sequence[str]) -> str | None:
        """Why the loop would not try an edit of a recipe; None where it would."""
        engines = self.session.target.engines
        if strangers := [text for text in edit if text.startswith("engine=") and text[7:] not in engines]:
            return f"{strangers[0]} is not among target.engines ({', '.join(engines)})"
        try:
            edited = self.composer.edited(recipe, edit)
            check_values(edited)
            problems = refusals(edited)
        except ConfigError as error:
            problems = list(error.problems)
        if not problems and edited.identity == recipe.identity:
            return "the recipe has it already"
        return problems[0] if problems else None

    @cached_property
    def _options(self) -> dict[str, list[Option]]:
        """Group -> its options on the config search path."""
        return {group: list(self._options_of(group)) for group in (*TECHNIQUES, "engine", "task")}

    def _options_of(self, group: str) -> Iterator[Option]:
        for name in self.composer.options(group):
            node: Mapping[str, Any] = {}
            try:
                node = self.composer.node(group, name, self.recipe)
                where = node.get("arch") or {} if group == "student" else node
                target = where.get("_target_")
                yield Option(group, name, node, locate(target, group) if target else None)
            except HastenError as error:
                yield Option(group, name, node, None, problem=" ".join(str(error).split()))

    def _taken(self, option: Option) -> str:
        """What the recipe, the rows and the machine have to give it."""
        wanted = [needed(entry) for entry in getattr(option.component, "requires", ())]
        if _trains(option.node):
            wanted.append("training")
        if rows := option.node.get("calibration_rows"):
            wanted.append(f"{rows} rows to measure ranges on")
        if getattr(self._constructed(option), "measures", False):
            wanted.append("timing on the target")
        return "; ".join(wanted)

    def _excluded(self, option: Option) -> str:
        excluded = list(option.never_with)
        if outputs := getattr(option.component, "outputs", None):
            excluded.append(f"tasks whose outputs are not {outputs}")
        return ", ".join(excluded)

    @staticmethod
    def _constructed(option: Option) -> Any:
        """The component with the knobs of its file; None where it takes others, such as an architecture's from data."""
        try:
            return construct(option.node, option.group) if option.node.get("_target_") else None
        except HastenError:
            return None

    @cached_property
    def _cells(self) -> dict[str, list[str | None]]:
        """Option of quantization -> why not, for every engine."""
        engines = {name: self._constructed(option) for name, option in self.engines.items()}
        return {
            option.name: [self._no(option, name, engine) for name, engine in engines.items()]
            for option in self._options["quantization"]
        }

    def _no(self, quantization: Option, name: str, engine: Any) -> str | None:
        """Why an engine can't run what is quantized so; None where it can."""
        if quantization.problem:
            return quantization.problem
        if not isinstance(engine, Engine):
            return self.engines[name].problem or f"engine={name} is no Engine"
        if f"engine={name}" in quantization.never_with:
            return f"{quantization.title} can't be combined with engine={name}"
        return engine.supports(quantization.component is not None, self.session.target)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        reasons = dict.fromkeys(cell for cells in self._cells.values() for cell in cells if cell)
        return {reason: number for number, reason in enumerate(reasons, start=1)}

    def _purpose(self, group: str, option: str) -> str:
        mine = [self.session.config_dir] if self.session.config_dir else []
        return options(group, [*mine, conf_folder()]).get(option, "")

    def _changed(self, group: str, choices: Mapping[str, str]) -> str:
        """The knobs that the recipe sets otherwise than its option's file."""
        usual = dict(_leaves(self.composer.node(group, choices[group], self.recipe)))
        found = dict(_leaves(self.recipe.section(group)))
        return ", ".join(f"{key}={value}" for key, value in found.items() if key not in usual or usual[key] != value)


def _trains(node: Mapping[str, Any]) -> bool:
    """Whether a component has anything to do with its `training`: 0 epochs are none."""
    return bool((node.get("training") or {}).get("epochs"))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below a node."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
