"""What a strategy really gave, in this run or in an earlier one, against what was expected of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.trial import Trial

MAX_RATIO = 2.0
"""One lucky trial says no more than that a strategy gives twice what was expected, on the logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One trial of a strategy.

    Attributes:
        expected_gain: speed-up against the parent that was predicted, above 1.
        measured_gain: speed-up against the parent; 1 for what was rejected or failed.
    """

    strategy: str
    expected_gain: float
    measured_gain: float


def correction(strategy: str, lessons: Iterable[Lesson]) -> float:
    """The factor on the logarithm of a strategy's declared gain that its earlier trials suggest.

    (1 + sum of r_i) / (1 + n): the mean of r_i = log(measured_i) / log(declared_i) over the n trials and one
    pseudo-observation of 1, the trust in the declaration. Each r_i is kept in [0, 2]. A trial records
    what was expected after correction, so that log(declared_i) is log(expected_i) over the correction by those before.
    """
    total, count = 1.0, 1
    for lesson in lessons:
        if lesson.strategy == strategy:
            declared = math.log(lesson.expected_gain) / (total / count)
            total += min(MAX_RATIO, max(0.0, math.log(lesson.measured_gain) / declared))
            count += 1
    return total / count


def lessons(history: Sequence[Trial]) -> tuple[Lesson, ...]:
    """What the trials of one run teach, in their order.

    A trial's own measured gain is against the best of its time. Where that was no longer the parent, the gains of what
    was accepted in between belong to it. Trials without an expected gain above 1 teach nothing about time.
    """
    return _lessons([vars(trial) for trial in history])


def read_prior(path: str, optimize: str = "p50") -> tuple[Lesson, ...]:
    """The lessons of an earlier run, from its summary.json.

    Args:
        optimize: what this run optimises: bytes that were saved teach nothing about time.

    Raises:
        ConfigError: there is no such file, it holds no trials, or its run optimised another quantity.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        trials = values["trials"]
        if not isinstance(trials, list):
            raise TypeError(f"trials must be a list, got {type(trials).__name__}")
        earlier = str(values.get("optimize", "p50"))
        found = _lessons(trials)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"planner.prior={path} can't be read: {reason}; give the summary.json of an earlier run"
        ) from error
    except KeyError as error:
        raise ConfigError(f"planner.prior={path} is no summary.json of a run: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"planner.prior={path} is no summary.json of a run: {error}") from error
    if _quantity(earlier) != _quantity(optimize):
        raise ConfigError(f"planner.prior={path} optimised {earlier}, which teaches nothing about {optimize}")
    return found


def _quantity(optimize: str) -> str:
    """Size, memory or time: rows per second and every percentile of the latency are shortened by the same moves."""
    return optimize if optimize in ("size", "memory") else "time"


def _lessons(trials: Sequence[Mapping[str, Any]]) -> tuple[Lesson, ...]:
    found = []
    accepted: dict[int, float] = {}
    for trial in trials:
        expected, measured = _gain(trial, "expected_gain"), _gain(trial, "measured_gain")
        gain = 1.0
        if trial["verdict"] == "accepted" and measured is not None:
            number, parent = int(trial.get("number", 0)), trial.get("parent")
            since = [value for other, value in accepted.items() if parent is not None and parent < other < number]
            gain = measured * math.prod(since)
            accepted[number] = measured
        if expected is not None and expected > 1:
            found.append(Lesson(strategy=str(trial["strategy"]), expected_gain=expected, measured_gain=gain))
    return tuple(found)


def _gain(trial: Mapping[str, Any], name: str) -> float | None:
    value = trial.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)
