"""What counts as better, and what a candidate must hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Lt

from hasten.core.trial import Evaluation, Quality, Verdict
from hasten.core.trial import Interval as Ratio

MEMORY_NOISE = 1.02
"""Peak resident sets of one model in two processes differ by up to this ratio: less is no difference."""

Quantity = Literal["speed", "throughput", "size", "memory"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The best of one quantity inside the constraints, which hold all at once whatever is optimised.

    Attributes:
        optimize: percentile of the request latency (`p50`, `p90`, `p99`), rows per second (`throughput`), bytes of the
            deployable files (`size`) or peak resident set of the serving process (`memory`).
        max_drop: largest loss of quality that is tolerated, at `confidence`, for every metric that says no other
            (`task.metrics.<name>.max_drop`): a share, 0.02 is 2 points or, where the metric is relative, 2 % of the
            baseline.
        confidence: of the quality bound, one-sided; and of the latency intervals, two-sided.
        max_latency_ms: constraint on the upper end of the interval of `latency_percentile`; None for none.
        min_throughput: constraint on the lower end of the interval of rows per second; None for none.
        max_size_mb: constraint on the deployable files, 1 MB = 10^6 bytes; None for none.
        max_memory_mb: constraint on the serving process' peak resident set; None for none.
        goal_speedup: stop as soon as the lower end of the speed-up against eager reaches it; None to go on.
        min_gain: smallest gain of what is optimised that is worth a more complicated recipe, as a ratio: 1.02 is 2 %.
    """

    optimize: Literal["p50", "p90", "p99", "throughput", "size", "memory"] = "p50"
    max_drop: Annotated[float, Interval(ge=0, lt=1)] = 0.02
    confidence: Annotated[float, Interval(gt=0.5, lt=1)] = 0.95
    max_latency_ms: Annotated[float, Gt(0)] | None = None
    min_throughput: Annotated[float, Gt(0)] | None = None
    max_size_mb: Annotated[float, Gt(0)] | None = None
    max_memory_mb: Annotated[float, Gt(0)] | None = None
    goal_speedup: Annotated[float, Gt(1)] | None = None
    min_gain: Annotated[float, Ge(1), Lt(10)] = 1.02

    @property
    def latency_percentile(self) -> Literal["p50", "p90", "p99"]:
        """What `max_latency_ms` limits: the percentile that is optimised, `p50` where none is."""
        return self.optimize if self.optimize in ("p50", "p90", "p99") else "p50"

    @property
    def speed(self) -> Literal["p50", "p90", "p99", "mean"]:
        """The statistic of the request times whose ratio is `Evaluation.speedup`.

        `mean` where throughput is optimised: a process that serves one request after the other serves batch_size / mean
        rows a second. Both sides run in turns, so that this ratio is sharper than that of two throughputs measured in
        different sessions.
        """
        return "mean" if self.optimize == "throughput" else self.latency_percentile

    @property
    def quantity(self) -> Quantity:
        match self.optimize:
            case "throughput" | "size" | "memory":
                return self.optimize
            case _:
                return "speed"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Accepted or rejected, and why. `holds`: every constraint is held, whatever is gained."""

    verdict: Verdict
    holds: bool
    reason: str


def judge(
    candidate: Evaluation, best: Evaluation, objective: Objective, *, min_integer_share: float = 0.0
) -> Judgement:
    """Accepts what is measurably better than the best so far and holds every constraint.

    Quality and the integer share have to hold. A limit of latency, throughput, size or memory that the best breaks as
    well may still be broken, as long as the candidate comes closer: so the loop can work its way towards a limit.
    """
    share = candidate.integer_share
    if share is not None and share < min_integer_share:
        wanted = f"{min_integer_share:.0%} wanted (quantization.min_integer_share)"
        return _rejected(f"only {share:.0%} of its convolutions and linear layers run in integers, {wanted}")
    if lost := [_quality_reason(name, each) for name, each in candidate.metrics.items() if not each.holds]:
        return _rejected("; ".join(lost))
    note = "; quality unchecked" if candidate.unchecked else ""
    violation, before = _violation(candidate, objective), _violation(best, objective)
    if violation > 0 and violation >= before:
        return _rejected(binding(candidate, objective) or "")
    gained = gain(candidate, best, objective.quantity)
    told = _told(gained, objective.quantity)
    if violation < before:
        if _comes_closer(candidate, best, objective):
            return Judgement(verdict="accepted", holds=violation == 0, reason=f"closer to the limits; {told}{note}")
        return _rejected(f"not measurably closer to the limits: {told}")
    holds = violation == 0
    better, worse = _WORDS[objective.quantity]
    if gained.high < 1:
        return Judgement(verdict="rejected", holds=holds, reason=f"{worse}: {told}")
    if gained.low <= 1:
        measurably = "" if objective.quantity == "size" else "measurably "
        return Judgement(verdict="rejected", holds=holds, reason=f"not {measurably}{better}: {told}")
    if gained.value < objective.min_gain:
        least = f"less than objective.min_gain={objective.min_gain:g}"
        return Judgement(verdict="rejected", holds=holds, reason=f"{least}: {told}")
    return Judgement(verdict="accepted", holds=holds, reason=f"{told}{note}")


def gain(candidate: Evaluation, best: Evaluation, quantity: Quantity) -> Ratio:
    """How many times better than the best before: speed and throughput as measured in turns, sizes exactly, memory
    within `MEMORY_NOISE`."""
    if quantity == "size":
        ratio = best.size_bytes / candidate.size_bytes
        return Ratio(value=ratio, low=ratio, high=ratio)
    if quantity == "memory":
        ratio = best.memory_bytes / candidate.memory_bytes
        return Ratio(value=ratio, low=ratio / MEMORY_NOISE, high=ratio * MEMORY_NOISE)
    return candidate.speedup["previous"]


def binding(evaluation: Evaluation, objective: Objective) -> str | None:
    """The limit that is broken most, and by how much; None where all hold."""
    broken = [limit for limit in _limits(evaluation, objective) if limit.excess > 0]
    return max(broken, key=lambda limit: limit.excess).told if broken else None


def excesses(evaluation: Evaluation, objective: Objective) -> dict[str, float]:
    """Where a candidate stands against everything that it has to hold: above 0 where it does not.

    Name of a limit (`speed`, `size`, `memory`, `throughput`) -> relative distance beyond it; name of a metric -> what
    it may have lost beyond what is tolerated, infinite where it can't be compared with the baseline.
    """
    found: dict[str, float] = {limit.quantity: limit.excess for limit in _limits(evaluation, objective)}
    judged = {name: each for name, each in evaluation.metrics.items() if each.max_drop is not None}
    lost = {
        name: each.drop.bound - each.max_drop if each.drop is not None and each.max_drop is not None else math.inf
        for name, each in judged.items()
    }
    return {**lost, **found}


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """Where a candidate stands against one limit: `excess` is the relative distance beyond it, negative inside."""

    quantity: Quantity
    excess: float
    told: str


def _limits(evaluation: Evaluation, objective: Objective) -> Iterator[_Limit]:
    latency = evaluation.latency_ms[objective.latency_percentile].high
    measured: tuple[tuple[Quantity, str, float, float | None, str, str], ...] = (
        ("speed", "latency", latency, objective.max_latency_ms, "ms", "max_latency_ms"),
        ("size", "size", evaluation.size_bytes / 1e6, objective.max_size_mb, "MB", "max_size_mb"),
        ("memory", "memory", evaluation.memory_bytes / 1e6, objective.max_memory_mb, "MB", "max_memory_mb"),
    )
    for quantity, name, value, limit, unit, key in measured:
        if limit is not None:
            told = f"{name} {value:.3g} {unit} is {value / limit:.2f}x of objective.{key}={limit:g}"
            yield _Limit(quantity=quantity, excess=value / limit - 1, told=told)
    if (least := objective.min_throughput) is not None:
        rows = evaluation.throughput.low
        shown = f"throughput {rows:.{0 if rows >= 100 else 2}f} rows/s"
        told = f"{shown} is {rows / least:.2f}x of objective.min_throughput={least:g}"
        yield _Limit(quantity="throughput", excess=least / rows - 1, told=told)


def _violation(evaluation: Evaluation, objective: Objective) -> float:
    return max([0.0, *(limit.excess for limit in _limits(evaluation, objective))])


def _comes_closer(candidate: Evaluation, best: Evaluation, objective: Objective) -> bool:
    """Whether a limit that the best breaks is measurably nearer, like any other gain; bytes of files are counted."""
    broken = {limit.quantity for limit in _limits(best, objective) if limit.excess > 0}
    return any(gain(candidate, best, quantity).low > 1 for quantity in broken)


def _quality_reason(name: str, quality: Quality) -> str:
    drop, allowed = quality.drop, quality.max_drop
    if drop is None or allowed is None:
        return f"{name} could not be compared with the baseline"
    changed = "dropped" if quality.higher_is_better else "risen"
    return (
        f"{drop.subject(name)} may have {changed} by {drop.told(drop.bound)} "
        f"({drop.confidence:.1%} bound on {drop.rows} rows), {drop.told(allowed)} allowed; "
        f"observed {drop.told(drop.value)}"
    )


_WORDS: dict[Quantity, tuple[str, str]] = {
    "speed": ("faster", "slower"),
    "throughput": ("more rows per second", "fewer rows per second"),
    "size": ("smaller", "larger"),
    "memory": ("less memory", "more memory"),
}
"""Better and worse."""


def _told(ratio: Ratio, quantity: Quantity) -> str:
    """A gain in the words of what is optimised, against the best before."""
    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    if quantity == "speed":
        return f"{ratio.value:.2f}x the speed of the best before {interval}"
    if quantity == "throughput":
        return f"{ratio.value:.2f}x the rows per second of the best before {interval}"
    better, worse = _WORDS[quantity]
    if quantity == "size" and ratio.value == 1:
        return "as large as the best before"
    times, word = (ratio.value, better) if ratio.value >= 1 else (1 / ratio.value, worse)
    noise = f" (below {MEMORY_NOISE - 1:.0%} is noise)" if quantity == "memory" else ""
    digits = 1 if times >= 1.95 else 2 if times >= 1.01 else 4
    return f"{times:.{digits}f}x {word} than the best before{noise}"


def _rejected(reason: str) -> Judgement:
    return Judgement(verdict="rejected", holds=False, reason=reason)
