"""How sure a measured difference is: bounds of quality drops and intervals of latencies and speed-ups.

Everything here is a deterministic function of its arguments, so that a stored measurement replays to the same decision.

Shapes: N rows or calls, B blocks of calls, R resamples, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.core.errors import HastenError, MeasurementError
from hasten.core.trial import Drop, Interval

Floats = NDArray[np.float64]
Blocks = Sequence[Sequence[float] | Floats]
"""One array of call times a block; blocks may differ in length."""

NUM_RESAMPLES = 2_000
"""Of intervals over blocks: from seed to seed their ends move by a few per cent of their width."""

NUM_ROW_RESAMPLES = 10_000
"""Of bounds over rows, whose corrected confidence lies far out in the tail."""

NUM_GROUPS = 2_000
"""Of rows that a statistic is computed without, at most: two statistics of 10 000 rows take some seconds."""

_FEWEST_CHANGED = 4.0
"""Changed rows, counted as of equal changes, that the bootstrap of a metric or a share needs to be asked about it.

Where about 2 to 5 of 100 rows changed in a rank correlation, its nominal 0.95 gave 0.6 to 0.8 in simulations, and the
bound by the range 0.93 to 0.98.
"""

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


def class_drops(
    baseline_scores: ArrayLike,
    candidate_scores: ArrayLike,
    labels: ArrayLike,
    confidence: float,
) -> dict[int, Drop]:
    """`paired_drop` on the rows of each class, by label in ascending order.

    The claim that no class lost more than a margin is true where all of its parts are, and is made only where every
    single bound holds. Such an intersection-union test keeps its confidence without a correction for the number of
    classes: Berger (1982), Technometrics 24:295, theorem 1.

    Args:
        baseline_scores: (N,), higher is better.
        candidate_scores: (N,), of the same rows in the same order.
        labels: (N,), integer classes of the same rows.
        confidence: one-sided, of each bound and of the claim about all of them.

    Raises:
        MeasurementError: as `paired_drop`.
    """
    baseline_N, candidate_N = _paired(baseline_scores, candidate_scores)
    labels_N = np.asarray(labels)
    _paired(baseline_N, labels_N)
    return {
        int(label): paired_drop(baseline_N[labels_N == label], candidate_N[labels_N == label], confidence)
        for label in np.unique(labels_N)
    }


def relative_drop(
    baseline_scores: ArrayLike, candidate_scores: ArrayLike, confidence: float, *, higher_is_better: bool
) -> Drop:
    """Drop as a share of the baseline's mean, with its one-sided upper bound.

    An error of 0.30 that rises to 0.33 is 0.10. The share exceeds m where the mean of the contrast (drop - m *
    baseline) of single rows is above 0. The bound is the smallest m at which the upper bound of that mean is at most 0,
    as in Fieller (1954), JRSS B 16:175, but with the studentised bootstrap in the place of Student's t, since scores of
    rows (squared errors) are skewed and candidate and baseline differ in few of them.

    Args:
        baseline_scores: (N,).
        candidate_scores: (N,), of the same rows in the same order.
        confidence: one-sided, above 0.5; already corrected for the number of looks.

    Raises:
        MeasurementError: no rows, different numbers of rows, scores that are not finite, or a baseline whose mean is
            not surely above 0, of which nothing can be a share.
    """
    baseline_N, candidate_N = _paired(baseline_scores, candidate_scores)
    differences_N = baseline_N - candidate_N if higher_is_better else candidate_N - baseline_N
    mean = float(baseline_N.mean())
    bound = _relative_bound(baseline_N, candidate_N, confidence, higher_is_better)
    return Drop(value=float(differences_N.mean()) / mean, bound=bound, confidence=confidence, rows=len(baseline_N))


def statistic_drop(
    statistic: Callable[[NDArray[Any], NDArray[Any]], float],
    baseline_outputs: NDArray[Any],
    candidate_outputs: NDArray[Any],
    targets: NDArray[Any],
    confidence: float,
    *,
    higher_is_better: bool,
    relative: bool,
    groups: int = NUM_GROUPS,
) -> Drop:
    """Drop of a metric that is no mean over rows (F1, a rank correlation), with its one-sided upper bound.

    Each row gets the score that it contributes: the jackknife's pseudo-value, n * (metric of all rows) - (n - 1) *
    (metric without the row), Tukey (1958), Annals of Mathematical Statistics 29:614. Pseudo-values of a mean are the
    rows' own scores. Those of candidate and baseline are then compared as pairs by the studentised bootstrap over rows,
    as other scores are. The percentile, basic and BCa bootstraps of the metric itself are no alternative: with 4 of 100
    to 200 rows changed their nominal 0.95 gave 0.77 to 0.89 for the F1, and without a changed row they claim certainty;
    this gave 0.93 and more.

    The metric has to be smooth: no single row may decide it, as it does a median or a worst case.

    Args:
        statistic: metric of outputs and targets.
        baseline_outputs: (N, ...).
        candidate_outputs: (N, ...), of the same rows in the same order.
        targets: (N, ...), of the same rows.
        confidence: one-sided, above 0.5; already corrected for the number of looks.
        relative: the drop is a share of the baseline's metric.
        groups: of more rows than this, so many random groups are left out instead of single rows.

    Raises:
        MeasurementError: fewer than two rows, different numbers of rows, a metric that has no finite value or loses it
            without some of the rows, or as `relative_drop`.
    """
    rows = len(targets)
    if rows < 2 or len(baseline_outputs) != rows or len(candidate_outputs) != rows:
        raise MeasurementError(
            f"a paired comparison needs outputs for the same rows, at least 2 of them, got {len(baseline_outputs)} and "
            f"{len(candidate_outputs)} for {rows} targets"
        )
    before, baseline_G = _pseudo_values(statistic, baseline_outputs, targets, groups)
    after, candidate_G = _pseudo_values(statistic, candidate_outputs, targets, groups)
    value = before - after if higher_is_better else after - before
    if relative:
        observed = relative_drop(baseline_G, candidate_G, confidence, higher_is_better=higher_is_better)
        value, bound = value / before, observed.bound + value / before - observed.value
    else:
        differences_G = baseline_G - candidate_G if higher_is_better else candidate_G - baseline_G
        score_range = float(np.ptp(np.concatenate([baseline_G, candidate_G, [0.0]])))
        bound = _real_valued_bound(differences_G, score_range, confidence) + value - float(differences_G.mean())
    return Drop(value=value, bound=bound, confidence=confidence, rows=rows)


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
    reference_blocks: Blocks, candidate_blocks: Blocks, confidence: float, seed: int, q: float | None = 50.0
) -> Interval:
    """Speed-up: median over rounds of (reference block / candidate block), with a bootstrap interval over rounds.

    A block is summarised by one percentile of its calls, or by their mean. Blocks of one round ran within milliseconds
    of each other, so that what slows the machine for longer than a round cancels in the ratio.

    Args:
        reference_blocks: call times of the reference, one block a round.
        candidate_blocks: of the candidate, the same rounds in the same order.
        confidence: two-sided, in (0, 1).
        q: the percentile, in [0, 100]; None for the mean.

    Raises:
        MeasurementError: no blocks, or different numbers of blocks.
    """
    if not len(reference_blocks) or len(reference_blocks) != len(candidate_blocks):
        raise MeasurementError(
            f"a ratio needs the same rounds of both sides, got {len(reference_blocks)} and {len(candidate_blocks)}"
        )
    ratios_B = _summaries(reference_blocks, q) / _summaries(candidate_blocks, q)
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
    100 rows changed, a nominal 0.95 gave 0.99 in simulations and BCa 0.88. Where the change hangs on a few rows it
    gives no bound, or one that is too small (0.90 with 6 rows changed in both directions); then `score_bound` does,
    with each change counted as the share of the range that it is. That one errs on the large side: within a range, of
    all distributions with the same mean the one on the two ends scatters most.
    """
    by_range = _bound_by_range(differences_N, score_range, confidence)
    deviation = float(differences_N.std())
    if deviation < 1e-12 * score_range or _rows_that_carry(differences_N) < _FEWEST_CHANGED:
        return by_range
    studentised_R = _studentised_means(differences_N, deviation)
    quantile = float(np.quantile(studentised_R, 1 - confidence, method="lower"))
    return min(by_range, float(differences_N.mean()) - quantile * deviation)


def _bound_by_range(differences_N: Floats, score_range: float, confidence: float) -> float:
    """`score_bound` with each change counted as the share of the range that it is; see `_real_valued_bound`."""
    if score_range == 0:
        return 0.0
    lost = float(differences_N.clip(min=0).sum()) / score_range
    gained = float((-differences_N).clip(min=0).sum()) / score_range
    rows = len(differences_N)
    return score_range * score_bound(min(lost, rows), min(gained, rows), rows, confidence)


def _rows_that_carry(differences_N: Floats) -> float:
    """How many equal changes would scatter like these: (sum d^2)^2 / sum d^4, 0 where nothing changed."""
    squares_N = np.square(differences_N)
    fourth = float(np.square(squares_N).sum())
    return float(squares_N.sum()) ** 2 / fourth if fourth else 0.0


def _relative_bound(baseline_N: Floats, candidate_N: Floats, confidence: float, higher_is_better: bool) -> float:
    """Smallest share m at which the upper bound of the mean of (drop - m * baseline) is at most 0."""
    sign = 1.0 if higher_is_better else -1.0
    differences_N = sign * (baseline_N - candidate_N)
    few = _rows_that_carry(differences_N) < _FEWEST_CHANGED
    upper = None if few else _contrast_bound(differences_N, baseline_N, confidence)

    def holds(share: float) -> bool:
        if upper is not None and upper(share) <= 0:
            return True
        # The contrast is the difference of the candidate and of a multiple of the baseline. Scores of which there are
        # shares may also be 0, where no row was.
        multiple_N = (1 - sign * share) * baseline_N
        score_range = float(np.ptp(np.concatenate([multiple_N, candidate_N, [0.0]])))
        return _bound_by_range(differences_N - share * baseline_N, score_range, confidence) <= 0

    mean = float(baseline_N.mean())
    low = float(differences_N.mean()) / mean if mean > 0 else 0.0
    step = 1e-3
    while mean > 0 and step < 1e4 and not holds(low + step):
        step *= 2
    if mean <= 0 or step >= 1e4:
        raise MeasurementError(
            f"a relative drop needs a baseline that is surely above 0, got a mean of {mean:.4g} over {len(baseline_N)} "
            "rows: use relative=false or more rows"
        )
    high = low + step
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _contrast_bound(differences_N: Floats, baseline_N: Floats, confidence: float) -> Callable[[float], float]:
    """Upper bound of the mean of (differences - share * baseline) by the studentised bootstrap, for any share.

    The same resamples serve every share: mean and deviation of a contrast follow from five resampled means.
    """
    drop, scale = float(differences_N.mean()), float(baseline_N.mean())
    # Centred first, so that a variance is no small difference of large numbers.
    drops_N, scales_N = differences_N - drop, baseline_N - scale
    moments_N5 = np.stack([drops_N, scales_N, drops_N**2, drops_N * scales_N, scales_N**2], axis=1)
    drops_R, scales_R, drops2_R, both_R, scales2_R = _resampled_means(moments_N5).T
    _, _, drops2, both, scales2 = moments_N5.mean(axis=0)

    def upper(share: float) -> float:
        variance = max(drops2 - 2 * share * both + share**2 * scales2, 0.0)
        shifts_R = drops_R - share * scales_R
        variances_R = drops2_R - 2 * share * both_R + share**2 * scales2_R - shifts_R**2
        spread_R = variances_R > 1e-12 * variance
        studentised_R = np.where(spread_R, shifts_R / np.sqrt(np.where(spread_R, variances_R, 1.0)), -np.inf)
        quantile = float(np.quantile(studentised_R, 1 - confidence, method="lower"))
        return drop - share * scale - quantile * sqrt(variance)

    return upper


def _resampled_means(values_NK: Floats) -> Floats:
    """Means over the rows of each resample, (R, K)."""
    rng, rows = np.random.default_rng(0), len(values_NK)
    chunk = max(1, _DRAWS_AT_ONCE // rows)
    means = []
    for start in range(0, NUM_ROW_RESAMPLES, chunk):
        resamples = min(chunk, NUM_ROW_RESAMPLES - start)
        flat = rng.integers(rows, size=(resamples, rows)) + rows * np.arange(resamples)[:, None]
        times_RN = np.bincount(flat.ravel(), minlength=resamples * rows).reshape(resamples, rows)
        means.append(times_RN @ values_NK / rows)
    return np.concatenate(means)


def _pseudo_values(
    statistic: Callable[[NDArray[Any], NDArray[Any]], float],
    outputs: NDArray[Any],
    targets: NDArray[Any],
    groups: int,
) -> tuple[float, Floats]:
    """The statistic of all rows, and the jackknife's pseudo-value of each group of rows (of each row, if they suffice).

    Groups differ by one row at most; each is weighed by its own size as by Busing, Meijer and van der Leeden (1999),
    Statistics and Computing 9:3.
    """
    rows = len(targets)
    whole = _finite(statistic, outputs, targets, "")
    group_N = np.arange(rows) if rows <= groups else np.random.default_rng(0).permutation(rows) % groups
    pseudo = []
    for group in range(min(rows, groups)):
        kept_N = group_N != group
        times = rows / (rows - int(kept_N.sum()))
        without = _finite(
            statistic, outputs[kept_N], targets[kept_N], f" without {rows - int(kept_N.sum())} of {rows} rows"
        )
        pseudo.append(times * whole - (times - 1) * without)
    return whole, np.array(pseudo)


def _finite(
    statistic: Callable[[NDArray[Any], NDArray[Any]], float], outputs: NDArray[Any], targets: NDArray[Any], which: str
) -> float:
    try:
        value = float(statistic(outputs, targets))
    except HastenError as error:
        if which:
            raise MeasurementError(f"the metric can't be computed{which}: {error}: more rows are needed") from error
        raise
    if not isfinite(value):
        raise MeasurementError(f"the metric is {value}{which}, so that no drop can be told: more rows are needed")
    return value


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


def _summaries(blocks: Blocks, q: float | None) -> Floats:
    """A percentile of each block, or its mean."""
    _sizes(blocks)
    return np.array([np.mean(block) if q is None else np.percentile(block, q) for block in blocks], dtype=np.float64)


def _interval(value: float, resampled_R: Floats, confidence: float) -> Interval:
    """The percentile interval of a bootstrap distribution."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))
