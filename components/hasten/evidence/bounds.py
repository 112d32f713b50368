"""How sure a measured difference is: bounds of quality drops and intervals of latencies and speed-ups.

Everything here is a deterministic function of its arguments, so that a stored measurement replays to the same decision.

Shapes: N rows or calls, B blocks of calls, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.core.errors import MeasurementError
from hasten.core.trial import Drop, Interval

Floats = NDArray[np.float64]
Blocks = Sequence[Sequence[float] | Floats]
"""One array of call times a block; blocks may differ in length."""

NUM_RESAMPLES = 2_000
"""Of intervals over blocks: from seed to seed their ends move by a few per cent of their width."""

NUM_ROW_RESAMPLES = 10_000
"""Of bounds over rows, whose corrected confidence lies far out in the tail."""

_DRAWS_AT_ONCE = 2_000_000
"""Row numbers held in memory at once while resampling (16 MB)."""


def corrected(confidence: float, looks: int) -> float:
    """Confidence that each of `looks` comparisons on the same rows needs for all to hold together (Bonferroni)."""
    if looks < 1:
        raise MeasurementError(f"looks must be at least 1, got {looks}")
    return 1.0 - (1.0 - confidence) / looks


def paired_drop(baseline_scores: ArrayLike, candidate_scores: ArrayLike, confidence: float) -> Drop:
    """Mean of baseline minus candidate over the same rows, with its one-sided upper bound.

    Where all scores are 0 or 1 the bound is Tango's (`score_bound`); else a studentised bootstrap over rows, for scores
    that may lie between the smallest and the largest one that was seen.

    Args:
        baseline_scores: (N,), higher is better.
        candidate_scores: (N,), of the same rows in the same order.
        confidence: one-sided, above 0.5; already corrected for the number of looks.

    Raises:
        MeasurementError: no rows, different numbers of rows, or scores that are not finite.
    """
    baseline_N, candidate_N = _paired(baseline_scores, candidate_scores)
    differences_N = baseline_N - candidate_N
    rows = len(differences_N)
    if _is_binary(baseline_N) and _is_binary(candidate_N):
        bound = score_bound(int((differences_N > 0).sum()), int((differences_N < 0).sum()), rows, confidence)
    else:
        score_range = float(np.ptp(np.concatenate([baseline_N, candidate_N])))
        bound = _real_valued_bound(differences_N, score_range, confidence)
    return Drop(value=float(differences_N.mean()), bound=bound, confidence=confidence, rows=rows)


def score_bound(lost: float, gained: float, rows: int, confidence: float) -> float:
    """One-sided upper bound of a difference of paired proportions, by inverting Tango's score test.

    Tango (1998), Statistics in Medicine 17:891, equations 24 to 26. The Wald interval is no alternative: it claims
    certainty when no row differs. Where nothing was gained this is Wilson's bound of lost / rows. Being asymptotic, at
    a confidence of 0.95 it is exceeded in up to 6.7 instead of 5 % of the cases when a handful of rows differ; from
    0.975 on, where corrected confidences lie, it keeps what it says (exact enumeration, 60 to 500 rows).

    Args:
        lost: rows that the baseline has right and the candidate wrong.
        gained: rows that the candidate has right and the baseline wrong.
        rows: all rows, those that agree included.
        confidence: one-sided, in (0.5, 1).
    """
    from scipy.optimize import brentq

    if lost >= rows:
        return 1.0
    z = _normal_quantile(confidence)

    def excess(drop: float) -> float:
        linear = (2 * rows - lost + gained) * drop - lost - gained
        root = sqrt(max(linear**2 + 8 * rows * gained * drop * (1 - drop), 0.0))
        gained_share = (root - linear) / (4 * rows)
        variance = rows * (2 * gained_share + drop * (1 - drop))
        return rows * drop - (lost - gained) - z * sqrt(max(variance, 0.0))

    # The observed difference itself is a second root when no row, or every row, differs.
    return float(brentq(excess, (lost - gained) / rows + 1e-12, 1.0, xtol=1e-12))


def smallest_certifiable(rows: int, confidence: float) -> float:
    """Bound of the drop when not one of the rows differs: no smaller drop can be certified with so few rows.

    z^2 / (rows + z^2), the closed form of `score_bound` without discordant rows.
    """
    z = _normal_quantile(confidence)
    return z**2 / (rows + z**2)


def rows_to_certify(margin: float, confidence: float) -> int:
    """Fewest rows with which a drop of `margin` (above 0) can be certified, if not one of them differs."""
    z = _normal_quantile(confidence)
    return ceil(z**2 * (1 - margin) / margin)


@dataclass(frozen=True, kw_only=True)
class ChanceTest:
    """Whether a classifier surely beats the answer that ignores its input.

    Attributes:
        accuracy: observed share of correct rows.
        low: one-sided lower bound of the accuracy at `confidence` (Clopper-Pearson, exact).
        majority: share of the commonest label, what the constant answer would score.
    """

    passed: bool
    accuracy: float
    low: float
    majority: float
    confidence: float
    rows: int


def better_than_chance(correct: ArrayLike, labels: ArrayLike, confidence: float) -> ChanceTest:
    """Whether the lower bound of the accuracy exceeds the share of the majority class.

    Args:
        correct: (N,), 1 where the row was classified correctly, else 0.
        labels: (N,), integer classes of the same rows.
        confidence: one-sided, in (0.5, 1).

    Raises:
        MeasurementError: no rows, different numbers of rows, or scores other than 0 and 1.
    """
    from scipy.special import betaincinv

    correct_N, labels_N = _paired(correct, labels)
    if not _is_binary(correct_N):
        raise MeasurementError("only rows that are right or wrong can be tested against chance, got other scores")
    rows, hits = len(correct_N), int(correct_N.sum())
    low = float(betaincinv(hits, rows - hits + 1, 1 - confidence)) if hits else 0.0
    majority = float(np.unique(labels_N, return_counts=True)[1].max() / rows)
    return ChanceTest(
        passed=low > majority, accuracy=hits / rows, low=low, majority=majority, confidence=confidence, rows=rows
    )


def bootstrap_ratio(
    reference_blocks: Blocks, candidate_blocks: Blocks, confidence: float, seed: int, q: float = 50.0
) -> Interval:
    """Speed-up: median over rounds of (reference block / candidate block), with a bootstrap interval over rounds.

    A block is summarised by one percentile of its calls. Blocks of one round ran within milliseconds of each other, so
    that what slows the machine for longer than a round cancels in the ratio.

    Args:
        reference_blocks: call times of the reference, one block a round.
        candidate_blocks: of the candidate, the same rounds in the same order.
        confidence: two-sided, in (0, 1).
        q: the percentile, in [0, 100].

    Raises:
        MeasurementError: no blocks, or different numbers of blocks.
    """
    if not len(reference_blocks) or len(reference_blocks) != len(candidate_blocks):
        raise MeasurementError(
            f"a ratio needs the same rounds of both sides, got {len(reference_blocks)} and {len(candidate_blocks)}"
        )
    ratios_B = _percentiles(reference_blocks, q) / _percentiles(candidate_blocks, q)
    picks_RB = np.random.default_rng(seed).integers(len(ratios_B), size=(NUM_RESAMPLES, len(ratios_B)))
    return _interval(float(np.median(ratios_B)), np.median(ratios_B[picks_RB], axis=1), confidence)


def percentile_interval(blocks: Blocks, q: float, confidence: float, seed: int) -> Interval:
    """Percentile of all calls, with a bootstrap interval over whole blocks, whose calls are not independent.

    The percentile is the smallest time that at least q % of the calls do not exceed.

    Args:
        q: in (0, 100].
        confidence: two-sided, in (0, 1).

    Raises:
        MeasurementError: no calls.
    """
    sizes_B = _sizes(blocks)
    times_N = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
    order_N = np.argsort(times_N, kind="stable")
    owners_N = np.repeat(np.arange(len(sizes_B)), sizes_B)[order_N]
    reached_NB = np.zeros((len(times_N), len(sizes_B)), dtype=np.int32)
    reached_NB[np.arange(len(times_N)), owners_N] = 1
    np.cumsum(reached_NB, axis=0, out=reached_NB)

    weights_RB = np.vstack([np.ones(len(sizes_B), dtype=np.int64), _resampled_weights(len(sizes_B), seed)])
    needed_R = np.ceil(weights_RB @ sizes_B * (q / 100) - 1e-9)
    low_R = np.zeros(len(weights_RB), dtype=np.int64)
    high_R = np.full(len(weights_RB), len(times_N) - 1)
    while (low_R < high_R).any():
        middle_R = (low_R + high_R) // 2
        enough_R = np.einsum("rb,rb->r", weights_RB, reached_NB[middle_R]) >= needed_R
        high_R = np.where(enough_R, middle_R, high_R)
        low_R = np.where(enough_R, low_R, np.minimum(middle_R + 1, high_R))
    percentiles_R = times_N[order_N][low_R]
    return _interval(float(percentiles_R[0]), percentiles_R[1:], confidence)


def rate_interval(blocks: Blocks, confidence: float, seed: int) -> Interval:
    """Calls per unit of time over all blocks, with a bootstrap interval over whole blocks.

    Raises:
        MeasurementError: no calls.
    """
    sizes_B = _sizes(blocks)
    totals_B = np.array([np.sum(block) for block in blocks], dtype=np.float64)
    weights_RB = _resampled_weights(len(sizes_B), seed)
    rates_R = (weights_RB @ sizes_B) / (weights_RB @ totals_B)
    return _interval(float(sizes_B.sum() / totals_B.sum()), rates_R, confidence)


def widened(interval: Interval, relative_sd: float, confidence: float) -> Interval:
    """Adds an independent, unseen variation to an interval of a positive quantity.

    On the logarithmic scale each side's distance becomes the root of the sum of squares of its own and that of the
    variation, taken as normal.

    Args:
        relative_sd: standard deviation of the variation relative to the value.
        confidence: two-sided, of the interval.
    """
    unseen = _normal_quantile((1 + confidence) / 2) * relative_sd
    value = interval.value
    down, up = np.hypot(np.log([value / interval.low, interval.high / value]), unseen)
    return Interval(value=value, low=float(value * np.exp(-down)), high=float(value * np.exp(up)))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    first_N, second_N = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first_N.ndim != 1 or first_N.shape != second_N.shape or not len(first_N):
        raise MeasurementError(f"a paired comparison needs the same rows twice, got {first_N.shape}, {second_N.shape}")
    if not (np.isfinite(first_N).all() and np.isfinite(second_N).all()):
        raise MeasurementError("a paired comparison needs finite scores, got NaN or infinity")
    return first_N, second_N


def _is_binary(scores_N: Floats) -> bool:
    return bool(((scores_N == 0) | (scores_N == 1)).all())


def _real_valued_bound(differences_N: Floats, score_range: float, confidence: float) -> float:
    """One-sided upper bound of a mean drop of scores that lie within a known range.

    The studentised bootstrap, because it covers where compression changes the scores of few rows by a lot: with 5 of
    100 rows changed, a nominal 0.95 gave 0.99 in simulations and BCa 0.88. Where so few rows changed that many
    resamples have no spread it gives no bound; then `score_bound` does, with each change counted as the share of the
    range that it is. That one errs on the large side: within a range, of all distributions with the same mean the one
    on the two ends scatters most.
    """
    if score_range == 0:
        return 0.0
    lost = float(differences_N.clip(min=0).sum()) / score_range
    gained = float((-differences_N).clip(min=0).sum()) / score_range
    by_range = score_range * score_bound(lost, gained, len(differences_N), confidence)
    deviation = float(differences_N.std())
    if deviation < 1e-12 * score_range:
        return by_range
    studentised_R = _studentised_means(differences_N, deviation)
    quantile = float(np.quantile(studentised_R, 1 - confidence, method="lower"))
    return min(by_range, float(differences_N.mean()) - quantile * deviation)


def _studentised_means(values_N: Floats, deviation: float) -> Floats:
    """(mean of a resample - mean) / standard deviation of the resample, (R,); minus infinity where that one is 0."""
    rng = np.random.default_rng(0)
    chunk = max(1, _DRAWS_AT_ONCE // len(values_N))
    studentised = []
    for start in range(0, NUM_ROW_RESAMPLES, chunk):
        shape = (min(chunk, NUM_ROW_RESAMPLES - start), len(values_N))
        resampled_RN = values_N[rng.integers(len(values_N), size=shape)]
        shifts_R, deviations_R = resampled_RN.mean(axis=1) - values_N.mean(), resampled_RN.std(axis=1)
        spread_R = deviations_R > 1e-12 * deviation
        studentised.append(np.where(spread_R, shifts_R / np.where(spread_R, deviations_R, 1.0), -np.inf))
    return np.concatenate(studentised)


def _resampled_weights(num_blocks: int, seed: int) -> NDArray[np.int64]:
    """How often each block was drawn, (R, B)."""
    picks_RB = np.random.default_rng(seed).integers(num_blocks, size=(NUM_RESAMPLES, num_blocks))
    flat = picks_RB + num_blocks * np.arange(NUM_RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=NUM_RESAMPLES * num_blocks).reshape(NUM_RESAMPLES, num_blocks)


def _sizes(blocks: Blocks) -> NDArray[np.int64]:
    sizes_B = np.array([np.size(block) for block in blocks], dtype=np.int64)
    if not len(sizes_B) or not sizes_B.all():
        raise MeasurementError("an interval needs at least one call in every block, got none")
    return sizes_B


def _percentiles(blocks: Blocks, q: float) -> Floats:
    _sizes(blocks)
    return np.array([np.percentile(block, q) for block in blocks], dtype=np.float64)


def _interval(value: float, resampled_R: Floats, confidence: float) -> Interval:
    """The percentile interval of a bootstrap distribution."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))
