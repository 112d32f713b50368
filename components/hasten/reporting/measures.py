"""What an objective optimises, as tables and figures show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hasten.core.trial import Evaluation, Interval
from hasten.reporting import units


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One quantity of an evaluation.

    Attributes:
        name: `latency p50`.
        low_is_better: less of it is better.
        of: its value with its interval.
        told: a value with its unit, three significant digits.
        tick: a round value with its unit, as short as it goes.
        counted: it has no interval.
    """

    name: str
    low_is_better: bool
    of: Callable[[Evaluation], Interval]
    told: Callable[[float], str]
    tick: Callable[[float], str]
    counted: bool = False

    @property
    def axis(self) -> str:
        hint = "" if self.low_is_better else "more is better, "
        return f"{self.name} ({hint}log scale{'' if self.counted else '; bars: confidence interval'})"

    def cost(self, evaluation: Evaluation) -> float:
        """Something that falls as the evaluation gets better."""
        value = self.of(evaluation).value
        return value if self.low_is_better else -value


def measure(optimize: str) -> Measure:
    """The quantity of an `objective.optimize`."""
    if optimize == "throughput":
        return Measure(name="rows per second", low_is_better=False, of=_throughput, told=units.count, tick=_rows)
    if optimize in ("size", "memory"):
        name = "size" if optimize == "size" else "peak memory"
        of = partial(_exactly, f"{optimize}_bytes")
        return Measure(name=name, low_is_better=True, of=of, told=units.size, tick=_bytes, counted=True)
    return Measure(
        name=f"latency {optimize}",
        low_is_better=True,
        of=partial(_latency, optimize),
        told=units.latency,
        tick=_milliseconds,
    )


def _latency(percentile: str, evaluation: Evaluation) -> Interval:
    return evaluation.latency_ms[percentile]


def _throughput(evaluation: Evaluation) -> Interval:
    return evaluation.throughput


def _exactly(field: str, evaluation: Evaluation) -> Interval:
    value = float(getattr(evaluation, field))
    return Interval(value=value, low=value, high=value)


def _milliseconds(value: float) -> str:
    return _scaled(value, (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)))


def _bytes(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _rows(value: float) -> str:
    return _scaled(value, (("M", 1e6), ("k", 1e3), ("", 1.0))).strip()


def _scaled(value: float, scales: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((scale for scale in scales if value >= scale[1]), scales[-1])
    return f"{value / size:g} {unit}"
