"""How metrics are told: in their own unit, with what may have been lost and what was allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.core.trial import Certificate, Evaluation, Quality, Trial

UNCHECKED = "unchecked"
UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric, before and after; every field but the first is text.

    Attributes:
        constrained: whether a candidate is refused for it.
        name: `accuracy`; where every class has to hold, the value is that of the lowest, and the name says so.
        before: the baseline's value; a dash where it is not known.
        after: the candidate's, `98.4 %` or `0.0123`.
        drop: what was observed, `0.56 points`; a dash for the baseline itself.
        bound: the largest drop that can't be excluded, with the class that it is of.
        allowed: the largest drop that is tolerated; a dash where there is no limit.
    """

    constrained: bool
    name: str
    before: str
    after: str
    drop: str
    bound: str
    allowed: str


def lines(metrics: Mapping[str, Quality], baselines: Mapping[str, float]) -> list[Line]:
    """Every metric in the task's order."""
    return [_line(name, quality, baselines.get(name)) for name, quality in metrics.items()]


def certified(certificate: Certificate) -> list[Line]:
    """What was read from the test rows."""
    return lines(certificate.metrics, {certificate.metric: certificate.baseline, **certificate.baselines})


def constrained(metrics: Mapping[str, Quality]) -> dict[str, Quality]:
    """The metrics that a candidate is refused for."""
    return {name: quality for name, quality in metrics.items() if quality.max_drop is not None}


def others(evaluation: Evaluation) -> list[Line]:
    """The constrained metrics beside the first."""
    beside = {name: each for name, each in constrained(evaluation.metrics).items() if name != evaluation.metric}
    return lines(beside, {})


def first(evaluation: Evaluation) -> Quality | None:
    """The metric that stands for all; None where nothing judged the outputs."""
    return evaluation.metrics.get(evaluation.metric)


def told(evaluation: Evaluation) -> str:
    """The first metric's value, `98.4 %` or `0.0123`; `unchecked` where there is none."""
    quality = first(evaluation)
    return UNCHECKED if quality is None else quality.told()


def bound(evaluation: Evaluation) -> str:
    """The first metric's largest drop without its unit, `1.49`, to stand in a narrow column; empty where unknown."""
    quality = first(evaluation)
    if quality is None or quality.drop is None:
        return ""
    drop = quality.drop
    return f"{100 * drop.bound:.2f}" if drop.relative or drop.points else f"{drop.bound:.3g}"


def bound_unit(trials: Sequence[Trial]) -> str:
    """What `bound` counts: `points`, `%` of the baseline, or nothing."""
    found = [first(trial.evaluation) for trial in trials if trial.evaluation is not None]
    drop = next((quality.drop for quality in found if quality is not None and quality.drop is not None), None)
    return "points" if drop is None else "%" if drop.relative else "points" if drop.points else ""


def sentence(line: Line) -> str:
    """`recall, lowest class 91.2 %, drop at most 3.10 points (class 3), allowed 10.00 points`."""
    parts = [f"{line.name} {line.after}"]
    parts += [f"drop at most {line.bound}"] if line.bound != UNKNOWN else []
    parts += [f"allowed {line.allowed}"] if line.allowed != UNKNOWN else []
    return ", ".join(parts)


def _line(name: str, quality: Quality, baseline: float | None) -> Line:
    drop, by_class = quality.drop, quality.drop is not None and quality.drop.label is not None
    bound = allowed = observed = UNKNOWN
    if drop is not None:
        observed = drop.told(drop.value)
        bound = drop.told(drop.bound) + (f" (class {drop.label})" if by_class else "")
        allowed = UNKNOWN if quality.max_drop is None else drop.told(quality.max_drop)
    return Line(
        constrained=quality.max_drop is not None,
        name=f"{name}, lowest class" if by_class else name,
        before=UNKNOWN if baseline is None else quality.told(baseline),
        after=quality.told(),
        drop=observed,
        bound=bound,
        allowed=allowed,
    )
