"""What a search over recipes chooses from: named decisions, each of which adds overrides to a recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.groups import GROUPS
from hasten.core.interfaces import Edit
from hasten.core.recipe import nearest
from hasten.core.search import LEFT_OUT

Value = str | int | float
Values = Mapping[str, Value]
"""Name of a decision -> what was decided: the overrides of an alternative as one text, or a number."""


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """One of several lists of overrides.

    Attributes:
        offered: the overrides of an alternative as one text -> these overrides.
        only_with: overrides of which one has to be chosen before; empty where it is always decided.
    """

    name: str
    offered: Mapping[str, Edit]
    only_with: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What decides whether there is anything to decide: nothing but `only_with`."""
        return ""

    def edit(self, value: Value) -> Edit:
        return self.offered[str(value)]

    def read(self, rest: Edit) -> Iterator[tuple[Value, Edit]]:
        """What may have been decided where these overrides follow, and the overrides after its own."""
        for text, edit in self.offered.items():
            if rest[: len(edit)] == edit:
                yield text, rest[len(edit) :]

    def grid(self) -> Sequence[Value]:
        return tuple(self.offered)


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two bounds, both included; a whole one where the bounds and the step are.

    Attributes:
        step: between the values that may be taken, from `low`; None for any.
        log: whether ratios count rather than differences.
        only_with: as of `Alternatives`.
    """

    name: str
    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    only_with: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step) if number is not None)

    def edit(self, value: Value) -> Edit:
        return (f"{self.key}={value:.6g}",)

    def read(self, rest: Edit) -> Iterator[tuple[Value, Edit]]:
        key, _, text = rest[0].partition("=") if rest else ("", "", "")
        if key == self.key:
            value = min(max(float(text), self.low), self.high)
            yield int(value) if self.whole else value, rest[1:]

    def grid(self) -> Sequence[Value]:
        """Every value that may be taken.

        Raises:
            ConfigError: they are not countable.
        """
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            raise ConfigError(f"space.{self.name} has no step, and a grid needs one: space.{self.name}.step=...")
        return [self.low + number * step for number in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]


Decision = Alternatives | Range


@dataclass(frozen=True, kw_only=True)
class Point:
    """One recipe of a space: what was decided, and the edit of the untouched model that follows."""

    values: Values
    edit: Edit


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Decisions, taken one after the other.

    A decision is left out, and its overrides with it, where none of its `only_with` was chosen before. A technique's
    knob that says nothing of that kind is left out where the technique is (`pruning.sparsity` beside `pruning=none`).
    """

    decisions: tuple[Decision, ...]
    given: Edit = ()

    @classmethod
    def of(cls, node: Any, given: Sequence[str] = ()) -> SearchSpace:
        """From the section `space` of the config.

        Args:
            given: overrides that every point has besides; they may choose the technique whose knob is searched.

        Raises:
            ConfigError: it is not spelt as it has to be, with one line for each problem.
        """
        if not isinstance(node, Mapping):
            raise ConfigError(f"space must map names to what is to be decided, got {node!r}")
        decisions: list[Decision] = []
        problems: list[str] = []
        for name, entry in node.items():
            if entry is None:  # `space.pruning=null` leaves it out
                continue
            try:
                decision = _decision(str(name), entry)
                problems += _unreachable(decision, decisions)
                decisions.append(decision)
            except ConfigError as error:
                problems += error.problems
        if not decisions and not problems:
            problems.append("space leaves nothing to decide: name at least one decision, or take space=recipe")
        if problems:
            raise ConfigError(*problems)
        return cls(decisions=tuple(decisions), given=tuple(given))

    def point(self, decide: Callable[[Decision], Value]) -> Point:
        """Where one gets by answering each question that arises."""
        values: dict[str, Value] = {}
        edit: Edit = ()
        for decision in self.decisions:
            if self._arises(decision, edit):
                values[decision.name] = decide(decision)
                edit = (*edit, *decision.edit(values[decision.name]))
        return Point(values=values, edit=edit)

    def values_of(self, edit: Edit) -> Values | None:
        """What was decided where an edit is a point of the space; None where it is none."""
        return next(self._read((), edit, self.decisions), None)

    def _read(self, before: Edit, rest: Edit, decisions: Sequence[Decision]) -> Iterator[dict[str, Value]]:
        if not decisions:
            if not rest:
                yield {}
            return
        first, *others = decisions
        if not self._arises(first, before):
            yield from self._read(before, rest, others)
            return
        for value, left in first.read(rest):
            for found in self._read((*before, *first.edit(value)), left, others):
                yield {first.name: value, **found}

    def grid(self) -> Iterator[Point]:
        """Every point, in the order in which the decisions and what they offer are declared.

        Raises:
            ConfigError: a number has no step.
        """
        for decision in self.decisions:
            decision.grid()  # what can't be counted is told before anything else
        return (Point(values=values, edit=edit) for values, edit in self._from((), self.decisions))

    def _from(self, before: Edit, decisions: Sequence[Decision]) -> Iterator[tuple[dict[str, Value], Edit]]:
        if not decisions:
            yield {}, before
            return
        first, *others = decisions
        if not self._arises(first, before):
            yield from self._from(before, others)
            return
        for value in first.grid():
            for found, edit in self._from((*before, *first.edit(value)), others):
                yield {first.name: value, **found}, edit

    def at(self, edit: Edit, rung: Edit) -> Edit:
        """An edit with the overrides of a rung; those of a technique's knobs go to who chose the technique alone."""
        chosen = _settled((*self.given, *edit))
        return (*edit, *(text for text in rung if _concerns(text.partition(".")[0], chosen)))

    def _arises(self, decision: Decision, before: Edit) -> bool:
        chosen = _settled((*self.given, *before))
        if decision.only_with:
            return any(chosen.get(key) == option for key, _, option in (it.partition("=") for it in decision.only_with))
        group, knob, _ = decision.key.partition(".")
        return not knob or _concerns(group, chosen)


TECHNIQUES = ("student", "distillation", "pruning", "quantization")
"""Groups whose knobs are there only where an option other than none or same is chosen."""


def _concerns(group: str, chosen: Mapping[str, str]) -> bool:
    return group not in TECHNIQUES or chosen.get(group, "none") not in LEFT_OUT


RANGE_KEYS = ("key", "low", "high", "step", "log", "only_with")
VALUES_KEYS = ("key", "values", "only_with")
ALTERNATIVES_KEYS = ("alternatives", "only_with")


def _decision(name: str, entry: Any) -> Decision:
    where = f"space.{name}"
    if isinstance(entry, list):
        entry = {"alternatives": entry}
    if not isinstance(entry, Mapping):
        forms = "a list of alternatives, or key with values or with low and high"
        raise ConfigError(f"{where} must be {forms}, got {entry!r}")
    allowed = ALTERNATIVES_KEYS if "alternatives" in entry else VALUES_KEYS if "values" in entry else RANGE_KEYS
    if strangers := [str(key) for key in entry if key not in allowed]:
        near = nearest(strangers[0], allowed)
        raise ConfigError(f"{where}.{strangers[0]} is no key of it{near}; it takes {', '.join(allowed)}")
    only_with = _texts(entry.get("only_with"), f"{where}.only_with")
    if "alternatives" in entry:
        return Alternatives(name=name, offered=_offered(entry["alternatives"], where), only_with=only_with)
    key = entry.get("key")
    if not isinstance(key, str) or not key:
        raise ConfigError(f"{where}.key must name a group or a knob, such as pruning.sparsity, got {key!r}")
    if "values" in entry:
        values = entry["values"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.values must be a list with at least one value, got {values!r}")
        offered = {f"{key}={_typed(value)}": (f"{key}={_typed(value)}",) for value in values}
        return _Knob(name=name, offered=offered, only_with=only_with, knob=key)
    return _range(name, key, entry, only_with)


@dataclass(frozen=True, kw_only=True)
class _Knob(Alternatives):
    """One of several values of a knob or a group."""

    knob: str

    @property
    def key(self) -> str:
        return self.knob


def _range(name: str, key: str, entry: Mapping[str, Any], only_with: tuple[str, ...]) -> Range:
    where = f"space.{name}"
    numbers = {bound: entry.get(bound) for bound in ("low", "high")}
    if (step := entry.get("step")) is not None:
        numbers["step"] = step
    for bound, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(f"{where}.{bound} must be a number, got {number!r}")
    log = entry.get("log") or False
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log must be true or false, got {log!r}")
    low, high = entry["low"], entry["high"]
    if low > high:
        raise ConfigError(f"{where}.low must be at most {where}.high={high:g}, got {low:g}")
    if step is not None and step <= 0:
        raise ConfigError(f"{where}.step must be above 0 or null, got {step:g}")
    if log and low <= 0:
        raise ConfigError(f"{where}.low must be above 0 where log=true, got {low:g}")
    if log and step is not None:
        raise ConfigError(f"{where}.step must be null where log=true, got {step:g}")
    return Range(name=name, key=key, low=low, high=high, step=step, log=log, only_with=only_with)


def _offered(alternatives: Any, where: str) -> dict[str, Edit]:
    if not isinstance(alternatives, list) or not alternatives:
        raise ConfigError(f"{where} must offer at least one alternative, got {alternatives!r}")
    offered: dict[str, Edit] = {}
    for place, alternative in enumerate(alternatives):
        if not isinstance(alternative, list) or any("=" not in str(text) for text in alternative):
            raise ConfigError(f"{where}[{place}] must be a list of overrides key=value, got {alternative!r}")
        edit = tuple(str(text) for text in alternative)
        offered[" ".join(edit)] = edit
    return offered


def _texts(given: Any, where: str) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or any(not isinstance(text, str) or "=" not in text for text in texts):
        raise ConfigError(f"{where} must be a list of overrides key=value, got {given!r}")
    return tuple(texts)


def _unreachable(decision: Decision, before: Sequence[Decision]) -> Iterator[str]:
    """Conditions that can never hold."""
    offered = {f"{key}={option}" for earlier in before for key, option in _offers(earlier)}
    for text in decision.only_with:
        if text not in offered:
            there = f"{nearest(text, sorted(offered))}; there are {', '.join(sorted(offered)) or 'none'}"
            yield f"space.{decision.name}.only_with: {text} is offered by no decision before it{there}"


def _offers(decision: Decision) -> Iterator[tuple[str, str]]:
    if isinstance(decision, Alternatives):
        for text in itertools.chain.from_iterable(decision.offered.values()):
            key, _, option = text.partition("=")
            yield key, option


def _settled(edit: Edit) -> dict[str, str]:
    """Key -> value: of two the last, and a group that is chosen again forgets its knobs."""
    chosen: dict[str, str] = {}
    for text in edit:
        key, _, value = text.partition("=")
        if key in GROUPS:
            chosen = {name: told for name, told in chosen.items() if not name.startswith(f"{key}.")}
        chosen[key] = value
    return chosen


def _typed(value: Any) -> str:
    """As it is typed on a command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value)
