"""Whether a changed training still learns as the baseline does: loss curves against what seeds differ by.

Shapes: K seeds, N steps, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hasten.core.errors import MeasurementError
from hasten.core.trial import LossCurves

SEGMENTS = 5
"""Of a curve, whose mean losses are compared. The first tells a slow start from a slow end, and of each a sum over many
steps is left, whose distribution is near enough to normal."""


def compare(
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    *,
    batch_sizes: tuple[int, int],
    confidence: float,
) -> LossCurves:
    """Holds a candidate's loss curves against those that the baseline gives with several seeds.

    Both saw the same number of rows and are cut into as many segments of equal numbers of rows. A segment holds where
    the candidate's mean loss lies below the upper end of the prediction interval for as many further seeds of the
    baseline: mean + t * s * sqrt(1/K + 1/K'), one-sided (Hahn and Meeker 1991, section 4.8). The deviation s
    between seeds is relative to the segment's mean loss and pooled over the segments, whose seeds each give K - 1
    degrees of freedom; they are not independent, so only those of one segment are counted. The confidence is divided
    among the segments (Bonferroni). Only more loss is held against it.

    Args:
        baseline: (K, N) losses of each step, K of at least 2.
        candidate: (K', N') losses; NaN or infinite ones never hold.
        batch_sizes: rows of a step of each.
        confidence: that a training which learns as the baseline does is not rejected, in (0.5, 1).

    Raises:
        MeasurementError: fewer than two seeds of the baseline or none of the candidate, or fewer steps than segments.
    """
    if len(baseline) < 2 or not len(candidate):
        raise MeasurementError(
            f"a spread needs 2 seeds of the baseline and 1 of the candidate, got {len(baseline)} and {len(candidate)}"
        )
    before_KS, after_KS = _segments(baseline), _segments(candidate)
    mean_S, reached_S = before_KS.mean(axis=0), after_KS.mean(axis=0)
    relative_S = before_KS.std(axis=0, ddof=1) / np.maximum(np.abs(mean_S), np.finfo(float).tiny)
    spread_S = float(np.sqrt((relative_S**2).mean())) * np.abs(mean_S)
    quantile = stats.t.ppf(1 - (1 - confidence) / SEGMENTS, df=len(baseline) - 1)
    limit_S = mean_S + quantile * spread_S * np.sqrt(1 / len(baseline) + 1 / len(candidate))
    holds = bool((reached_S <= limit_S).all())  # which NaN is not
    rows_before = len(baseline[0]) * batch_sizes[0]
    ends = [round(rows_before * (place + 1) / SEGMENTS) for place in range(SEGMENTS)]
    return LossCurves(
        holds=holds,
        rows=tuple(ends),
        baseline=tuple(mean_S.tolist()),
        limit=tuple(limit_S.tolist()),
        candidate=tuple(reached_S.tolist()),
        num_seeds=(len(baseline), len(candidate)),
        reason=_reason(reached_S, mean_S, limit_S, ends),
    )


def _segments(curves: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(K, S) mean losses."""
    losses_KN = np.asarray(curves, dtype=np.float64)
    if losses_KN.ndim != 2 or losses_KN.shape[1] < SEGMENTS:
        raise MeasurementError(f"loss curves need at least {SEGMENTS} steps, got {losses_KN.shape[-1]}")
    parts = np.array_split(losses_KN, SEGMENTS, axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def _reason(
    reached_S: NDArray[np.float64], mean_S: NDArray[np.float64], limit_S: NDArray[np.float64], ends: Sequence[int]
) -> str:
    """The segment that is nearest to its limit or farthest beyond it, in words."""
    allowed_S = np.maximum(limit_S - mean_S, np.finfo(float).tiny)
    excess_S = np.where(np.isfinite(reached_S), (reached_S - limit_S) / allowed_S, np.inf)
    worst = int(np.argmax(excess_S))
    where = f"up to row {ends[worst]}: loss {reached_S[worst]:.4g}"
    told = f"{where} against {mean_S[worst]:.4g} of the baseline, whose seeds allow {limit_S[worst]:.4g}"
    return f"{'within' if excess_S[worst] <= 0 else 'outside'} the seeds' spread {told}"
