"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hasten.core.trial import Evaluation, Interval, Quality, TrainingEvaluation, Trial
from hasten.reporting import plots, units
from hasten.reporting.facts import machine_facts
from hasten.reporting.page import page
from hasten.reporting.summary import tried

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two.

    Attributes:
        name: as people know it.
        where: id in MLflow, or folder.
        trial: what is compared: an iteration, or the best of a whole run.
        machine: facts of the machine that it was measured on; empty where nobody wrote them down.
    """

    name: str
    where: str
    trial: Trial
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, trial {self.trial.number}: {tried(self.trial)}"


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How much faster the second is than the first, and how that is known.

    Attributes:
        ratio: None where it is not known.
        how: one sentence.
    """

    ratio: Interval | None
    how: str

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than was measured."""
        if self.ratio is None:
            return "Which of the two is faster can't be told."
        told = units.ratio_interval(self.ratio)
        if self.ratio.low > 1:
            return f"The second is surely faster: {told}."
        if self.ratio.high < 1:
            return f"The second is surely slower: {told}."
        return f"No difference in speed can be told: {told}."


class Line(NamedTuple):
    """One line of a table."""

    name: str
    first: str
    second: str


def differences(first: Trial, second: Trial) -> list[Line]:
    """What is chosen or set otherwise, by its key."""
    one, other = _said(first), _said(second)
    keys = [*one, *(key for key in other if key not in one)]
    return [Line(key, one.get(key, UNKNOWN), other.get(key, UNKNOWN)) for key in keys if one.get(key) != other.get(key)]


def _said(trial: Trial) -> dict[str, str]:
    split = [override.lstrip("+~").partition("=")[::2] for override in trial.overrides]
    return {**trial.choices, **{name: value or "~" for name, value in split}}


def figures(first: Trial, second: Trial) -> list[Line]:
    """Everything that was measured of both, with its interval."""
    one, other = _figures(first), _figures(second)
    return [Line(name, one.get(name, UNKNOWN), other.get(name, UNKNOWN)) for name in {**one, **other}]


def _figures(trial: Trial) -> dict[str, str]:
    outcome = {"verdict": trial.verdict}
    if trial.evaluation is not None:
        return outcome | _of_requests(trial.evaluation)
    return outcome | (_of_training(trial.training) if trial.training is not None else {})


def _of_requests(found: Evaluation) -> dict[str, str]:
    told: dict[str, str] = {}
    if not found.emulated:
        told |= {f"latency {name}": units.latency_interval(each) for name, each in found.latency_ms.items()}
        told["rows per second"] = _counts(found.throughput)
    told |= {f"vs {name}": units.ratio_interval(each) for name, each in found.speedup.items()}
    for name, quality in found.metrics.items():
        told[name] = quality.told()
        told[f"{name} may have dropped by"] = _bound(quality)
    told["size"] = units.size(found.size_bytes)
    if not found.emulated:
        told["memory"] = units.size(found.memory_bytes)
    told["parameters"] = units.count(found.num_parameters)
    told["FLOP per row"] = units.count(found.flops)
    if found.integer_share is not None:
        told["layers in integers"] = units.share(found.integer_share)
    return told


def _of_training(found: TrainingEvaluation) -> dict[str, str]:
    told = {"rows per second": _counts(found.samples_per_second), "step": units.latency_interval(found.step_ms)}
    told |= {f"vs {name}": units.ratio_interval(each) for name, each in found.speedup.items()}
    told |= {"memory": units.size(found.memory_bytes), "start": units.duration(found.start_seconds)}
    return told | ({"loss": found.loss.reason} if found.loss is not None else {})


def _counts(interval: Interval) -> str:
    return f"{units.count(interval.value)} [{units.count(interval.low)}, {units.count(interval.high)}]"


def _bound(quality: Quality) -> str:
    return UNKNOWN if quality.drop is None else quality.drop.told(quality.drop.bound)


def compared(first: Side, second: Side, pairing: Pairing) -> str:
    """The whole page."""
    sides = {"the first": first, "the second": second}
    measured = [
        (name, side.trial.evaluation.latency_ms)
        for name, side in sides.items()
        if side.trial.evaluation is not None and not side.trial.evaluation.emulated
    ]
    return page(
        "compare.html",
        sides=list(sides.items()),
        pairing=pairing,
        differences=differences(first.trial, second.trial),
        figures=figures(first.trial, second.trial),
        picture=plots.latencies(measured) if measured else "",
        machines=[(name, machine_facts(side.machine)) for name, side in sides.items() if side.machine],
        same_machine=first.machine == second.machine,
    )
