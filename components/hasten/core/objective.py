"""What counts as better, and what a candidate must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Lt

from hasten.core.trial import Evaluation, Verdict
from hasten.core.trial import Interval as Ratio


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Lowest latency inside the constraints.

    Attributes:
        minimize: percentile of the request latency that is judged, `p50`, `p90` or `p99`.
        max_drop: largest loss of the metric that is tolerated, as a share (0.02 is 2 points), at `confidence`.
        confidence: of the quality bound, one-sided; and of the latency intervals, two-sided.
        max_latency_ms: constraint on the upper end of the percentile's interval; None for none.
        max_size_mb: constraint on the deployable files, 1 MB = 10^6 bytes; None for none.
        max_memory_mb: constraint on the serving process' peak resident set; None for none.
        goal_speedup: stop as soon as the lower end of the speed-up against eager reaches it; None to go on.
        min_gain: smallest gain that is worth a more complicated recipe, as a ratio: 1.02 is 2 % faster.
    """

    minimize: Literal["p50", "p90", "p99"] = "p50"
    max_drop: Annotated[float, Interval(ge=0, lt=1)] = 0.02
    confidence: Annotated[float, Interval(gt=0.5, lt=1)] = 0.95
    max_latency_ms: Annotated[float, Gt(0)] | None = None
    max_size_mb: Annotated[float, Gt(0)] | None = None
    max_memory_mb: Annotated[float, Gt(0)] | None = None
    goal_speedup: Annotated[float, Gt(1)] | None = None
    min_gain: Annotated[float, Ge(1), Lt(10)] = 1.02


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Accepted or rejected, and why. `holds`: every constraint is held, whatever the speed."""

    verdict: Verdict
    holds: bool
    reason: str


def judge(
    candidate: Evaluation, best: Evaluation, objective: Objective, *, min_integer_share: float = 0.0
) -> Judgement:
    """Accepts what is measurably better than the best so far and holds every constraint.

    Quality and the integer share have to hold. A limit of latency, size or memory that the best breaks as well may
    still be broken, as long as the candidate comes closer: so the loop can work its way towards a limit.
    """
    share = candidate.integer_share
    if share is not None and share < min_integer_share:
        wanted = f"{min_integer_share:.0%} wanted (quantization.min_integer_share)"
        return _rejected(f"only {share:.0%} of its convolutions and linear layers run in integers, {wanted}")
    if candidate.drop is not None and candidate.drop.bound > objective.max_drop:
        return _rejected(_quality_reason(candidate, objective))
    violation, before = _violation(candidate, objective), _violation(best, objective)
    if violation > 0 and violation >= before:
        return _rejected(binding(candidate, objective) or "")
    ratio, bytes_only = candidate.speedup["previous"], replace(objective, max_latency_ms=None)
    if violation < before:
        # Bytes are counted; that a latency comes closer has to be measurable, like any other gain.
        fewer_bytes = _violation(candidate, bytes_only) < _violation(best, bytes_only)
        if fewer_bytes or ratio.low > 1:
            return Judgement(verdict="accepted", holds=violation == 0, reason=f"closer to the limits; {_speed(ratio)}")
        return _rejected(f"not measurably closer to the limits: {_speed(ratio)}")
    holds = violation == 0
    if ratio.high < 1:
        return Judgement(verdict="rejected", holds=holds, reason=f"slower: {_speed(ratio)}")
    if ratio.low <= 1:
        return Judgement(verdict="rejected", holds=holds, reason=f"not measurably faster: {_speed(ratio)}")
    if ratio.value < objective.min_gain:
        least = f"less than objective.min_gain={objective.min_gain:g}"
        return Judgement(verdict="rejected", holds=holds, reason=f"{least}: {_speed(ratio)}")
    return Judgement(verdict="accepted", holds=holds, reason=_speed(ratio))


def binding(evaluation: Evaluation, objective: Objective) -> str | None:
    """The limit that is broken most, and by how much; None where all hold."""
    broken = [(excess, text) for excess, text in _limits(evaluation, objective) if excess > 0]
    return max(broken)[1] if broken else None


def _limits(evaluation: Evaluation, objective: Objective) -> list[tuple[float, str]]:
    """Relative excess over each limit, and its sentence."""
    measured = (
        ("latency", evaluation.latency_ms[objective.minimize].high, objective.max_latency_ms, "ms", "max_latency_ms"),
        ("size", evaluation.size_bytes / 1e6, objective.max_size_mb, "MB", "max_size_mb"),
        ("memory", evaluation.memory_bytes / 1e6, objective.max_memory_mb, "MB", "max_memory_mb"),
    )
    return [
        (value / limit - 1, f"{name} {value:.3g} {unit} is {value / limit:.2f}x of objective.{key}={limit:g}")
        for name, value, limit, unit, key in measured
        if limit is not None
    ]


def _violation(evaluation: Evaluation, objective: Objective) -> float:
    return max([0.0, *(excess for excess, _ in _limits(evaluation, objective))])


def _quality_reason(candidate: Evaluation, objective: Objective) -> str:
    drop = candidate.drop
    assert drop is not None
    return (
        f"{candidate.metric} may have dropped by {100 * drop.bound:.2f} points "
        f"({drop.confidence:.1%} bound on {drop.rows} rows), {100 * objective.max_drop:g} allowed; "
        f"observed {100 * drop.value:.2f}"
    )


def _speed(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x the speed of the best before [{ratio.low:.2f}, {ratio.high:.2f}]"


def _rejected(reason: str) -> Judgement:
    return Judgement(verdict="rejected", holds=False, reason=reason)
