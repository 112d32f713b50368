from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar

from hasten.core.errors import MeasurementError
from hasten.core.trial import Interval
from hasten.evidence.bounds import (
    better_than_chance,
    bootstrap_ratio,
    corrected,
    paired_drop,
    percentile_interval,
    rate_interval,
    rows_to_certify,
    score_bound,
    smallest_certifiable,
    widened,
)

counts = st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 400)).map(
    lambda drawn: (drawn[0], drawn[1], sum(drawn))
)


def rows(lost: int, gained: int, num_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of a baseline and a candidate that differ in so many rows; the rest is right in both."""
    baseline, candidate = np.ones(num_rows), np.ones(num_rows)
    candidate[:lost] = 0
    baseline[lost : lost + gained] = 0
    return baseline, candidate


@pytest.mark.parametrize(
    ("lost", "gained", "num_rows", "two_sided", "low", "high"),
    [
        (9, 3, 32, 0.95, -0.027, 0.390),  # Tango (1998), table II
        (0, 1, 44, 0.90, -0.096, 0.037),  # Tango (1998), soft contact lenses
        (1, 7, 21, 0.95, -0.517, -0.026),  # Fagerland, Lydersen, Laake (2014), airway hyper-responsiveness
    ],
)
def test_score_bound_gives_the_published_intervals(
    lost: int, gained: int, num_rows: int, two_sided: float, low: float, high: float
) -> None:
    one_sided = (1 + two_sided) / 2
    assert score_bound(lost, gained, num_rows, one_sided) == pytest.approx(high, abs=5e-4)
    assert -score_bound(gained, lost, num_rows, one_sided) == pytest.approx(low, abs=5e-4)


@given(lost=st.integers(0, 50), others=st.integers(1, 500), confidence=st.floats(0.6, 0.999))
def test_score_bound_is_wilsons_where_nothing_was_gained(lost: int, others: int, confidence: float) -> None:
    wilson = stats.binomtest(lost, lost + others).proportion_ci(confidence_level=2 * confidence - 1, method="wilson")
    assert score_bound(lost, 0, lost + others, confidence) == pytest.approx(wilson.high, abs=1e-9)


@settings(max_examples=25)
@given(counts=counts, confidence=st.floats(0.8, 0.99))
def test_score_bound_solves_the_score_equation(counts: tuple[int, int, int], confidence: float) -> None:
    lost, gained, num_rows = counts
    bound = score_bound(lost, gained, num_rows, confidence)

    def minus_log_likelihood(gained_share: float) -> float:
        shares = [gained_share + bound, gained_share, 1 - 2 * gained_share - bound]
        observed = [lost, gained, num_rows - lost - gained]
        return -sum(count * log(share) for count, share in zip(observed, shares, strict=True) if count)

    limits = (max(0.0, -bound) + 1e-12, (1 - bound) / 2 - 1e-12)
    gained_share = minimize_scalar(minus_log_likelihood, bounds=limits, method="bounded", options={"xatol": 1e-12}).x
    standard_error = sqrt((2 * gained_share + bound - bound**2) / num_rows)
    score = ((lost - gained) / num_rows - bound) / standard_error
    assert score == pytest.approx(-stats.norm.ppf(confidence), abs=2e-3)


@pytest.mark.parametrize("num_rows", [60, 250])
@pytest.mark.parametrize(("lost_share", "gained_share"), [(0.02, 0.0), (0.05, 0.05), (0.03, 0.01)])
@pytest.mark.parametrize(("confidence", "times_nominal"), [(0.95, 1.35), (0.99, 1.0)])
def test_score_bound_is_exceeded_hardly_more_often_than_it_says(
    num_rows: int, lost_share: float, gained_share: float, confidence: float, times_nominal: float
) -> None:
    agree = 1 - lost_share - gained_share
    misses = total = 0.0
    for lost in range(num_rows // 3):
        for gained in range(num_rows // 3 if gained_share else 1):
            chance = stats.multinomial.pmf(
                [lost, gained, num_rows - lost - gained], num_rows, [lost_share, gained_share, agree]
            )
            if chance > 1e-5:
                total += chance
                misses += chance * (score_bound(lost, gained, num_rows, confidence) < lost_share - gained_share)
    assert total > 0.99
    assert misses <= times_nominal * (1 - confidence)


@given(counts=counts, less=st.floats(0.55, 0.9), more=st.floats(0.91, 0.9999))
def test_drop_is_bounded_from_above_and_wider_with_more_confidence(
    counts: tuple[int, int, int], less: float, more: float
) -> None:
    lost, gained, _ = counts
    baseline, candidate = rows(*counts)
    near, far = paired_drop(baseline, candidate, less), paired_drop(baseline, candidate, more)
    assert near.value == pytest.approx((lost - gained) / counts[2])
    assert near.value <= near.bound <= far.bound <= 1


def test_refuses_a_margin_with_few_rows_that_many_rows_certify() -> None:
    assert paired_drop(*rows(1, 1, 100), 0.95).bound > 0.02
    assert paired_drop(*rows(20, 20, 2000), 0.95).bound < 0.02


def test_bound_stays_honest_when_no_row_and_when_every_row_differs() -> None:
    assert score_bound(0, 0, 500, 0.95) == pytest.approx(smallest_certifiable(500, 0.95))
    assert smallest_certifiable(500, 0.95) == pytest.approx(1.6448536**2 / (500 + 1.6448536**2))
    assert score_bound(500, 0, 500, 0.95) == 1
    assert -1 < score_bound(0, 500, 500, 0.95) < -0.98


@given(margin=st.floats(0.001, 0.5), confidence=st.floats(0.6, 0.999))
def test_rows_to_certify_are_just_enough(margin: float, confidence: float) -> None:
    needed = rows_to_certify(margin, confidence)
    assert smallest_certifiable(needed, confidence) <= margin * (1 + 1e-9)
    if needed > 1:
        assert smallest_certifiable(needed - 1, confidence) >= margin * (1 - 1e-9)


def test_the_bound_of_many_real_valued_scores_is_students() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.normal(size=400)
    differences = rng.normal(0.1, 0.5, size=400)
    drop = paired_drop(baseline, baseline - differences, 0.95)
    margin = stats.t.ppf(0.95, 399) * stats.sem(differences)
    assert drop.value == pytest.approx(differences.mean())
    assert drop.bound - drop.value == pytest.approx(margin, rel=0.05)


@pytest.mark.parametrize("changed", [0.04, 0.3])
def test_real_valued_scores_are_covered_also_where_few_rows_change(changed: float) -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(100):
        baseline = rng.normal(size=100)
        lost = (rng.random(100) < changed) * rng.exponential(size=100)
        covered.append(paired_drop(baseline, baseline - lost, 0.9).bound >= changed)
    assert np.mean(covered) >= 0.9 - 0.06


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_few_changed_real_valued_scores_are_bounded_by_their_range(lost: int) -> None:
    baseline = np.linspace(0, 4, 201)
    candidate = baseline.copy()
    candidate[100 : 100 + lost] = 0.0
    drop = paired_drop(baseline, candidate, 0.95)
    right_or_wrong = score_bound(baseline[100 : 100 + lost].sum() / 4, 0, 201, 0.95)
    assert drop.bound == pytest.approx(4 * right_or_wrong)


def test_scores_without_any_range_drop_by_nothing() -> None:
    assert paired_drop([0.5, 0.5], [0.5, 0.5], 0.95).bound == 0


def test_moving_all_scores_moves_no_bound() -> None:
    rng = np.random.default_rng(9)
    baseline, candidate = rng.normal(size=(2, 60))
    here, there = paired_drop(baseline, candidate, 0.95), paired_drop(7 + 2 * baseline, 7 + 2 * candidate, 0.95)
    assert there.bound == pytest.approx(2 * here.bound)


def test_drop_is_the_same_every_time() -> None:
    rng = np.random.default_rng(3)
    baseline, candidate = rng.normal(size=(2, 50))
    assert paired_drop(baseline, candidate, 0.95) == paired_drop(baseline, candidate, 0.95)


@pytest.mark.parametrize(
    ("baseline", "candidate"), [([], []), ([1.0], [1.0, 0.0]), ([1.0, np.nan], [1.0, 0.0]), ([[1.0]], [[1.0]])]
)
def test_refuses_scores_that_are_no_pairs(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(MeasurementError, match="paired comparison"):
        paired_drop(baseline, candidate, 0.95)


def test_confidence_is_divided_among_the_looks() -> None:
    assert corrected(0.95, 1) == pytest.approx(0.95)
    assert corrected(0.95, 10) == pytest.approx(0.995)
    with pytest.raises(MeasurementError, match="looks"):
        corrected(0.95, 0)


def test_lower_bound_of_the_accuracy_is_exact() -> None:
    test = better_than_chance(np.ones(10), [0, 1] * 5, 0.95)
    assert test.low == pytest.approx(0.05 ** (1 / 10))
    hits = stats.binomtest(30, 40).proportion_ci(confidence_level=0.9, method="exact").low
    assert better_than_chance([1] * 30 + [0] * 10, [0] * 20 + [1] * 20, 0.95).low == pytest.approx(hits)


def test_only_what_surely_beats_the_commonest_class_is_better_than_chance() -> None:
    labels = [0] * 70 + [1] * 30
    always_zero = better_than_chance([1] * 70 + [0] * 30, labels, 0.95)
    assert (always_zero.passed, always_zero.majority, always_zero.accuracy) == (False, 0.7, 0.7)
    assert not better_than_chance([1] * 75 + [0] * 25, labels, 0.95).passed
    assert better_than_chance([1] * 85 + [0] * 15, labels, 0.95).passed
    assert not better_than_chance(np.zeros(4), [0, 1, 2, 3], 0.95).passed


def rounds(rng: np.random.Generator, num_rounds: int, speedup: float, noise: float) -> tuple[list, list]:  # type: ignore[type-arg]
    """Blocks of a reference and a candidate that drift together and scatter apart."""
    drift = np.exp(np.cumsum(rng.normal(scale=0.05, size=(num_rounds, 1)), axis=0))
    scatter = np.exp(rng.normal(scale=noise, size=(2, num_rounds, 1)))
    calls = np.exp(rng.normal(scale=0.1, size=(2, num_rounds, 21)))
    return list(speedup * drift * scatter[0] * calls[0]), list(drift * scatter[1] * calls[1])


def test_speedup_is_the_median_of_the_paired_ratios() -> None:
    reference = [[6.0, 6.0, 60.0], [4.0], [9.0, 11.0]]
    candidate = [[2.0], [1.0, 1.0, 1.0], [1.0]]
    interval = bootstrap_ratio(reference, candidate, 0.95, seed=0)
    assert (interval.low, interval.value, interval.high) == (3.0, 4.0, 10.0)


def test_what_slows_both_sides_down_leaves_the_speedup_alone() -> None:
    candidate = np.random.default_rng(4).lognormal(size=(20, 5))
    interval = bootstrap_ratio(list(2 * candidate), list(candidate), 0.95, seed=0)
    assert (interval.low, interval.value, interval.high) == pytest.approx((2, 2, 2))


def test_noise_larger_than_the_gain_leaves_one_inside_the_interval() -> None:
    interval = bootstrap_ratio(*rounds(np.random.default_rng(5), 30, speedup=1.02, noise=0.2), 0.95, seed=0)
    assert interval.low < 1 < interval.high


@pytest.mark.parametrize("num_rounds", [15, 40])
def test_speedup_interval_covers_the_truth(num_rounds: int) -> None:
    rng = np.random.default_rng(6)
    intervals = [bootstrap_ratio(*rounds(rng, num_rounds, 1.5, noise=0.05), 0.9, seed) for seed in range(200)]
    assert np.mean([interval.low <= 1.5 <= interval.high for interval in intervals]) >= 0.9 - 0.06


def test_refuses_a_ratio_of_unequal_rounds() -> None:
    with pytest.raises(MeasurementError, match="2 and 1"):
        bootstrap_ratio([[1.0], [1.0]], [[1.0]], 0.95, seed=0)
    with pytest.raises(MeasurementError, match="0 and 0"):
        bootstrap_ratio([], [], 0.95, seed=0)
    with pytest.raises(MeasurementError, match="at least one call"):
        bootstrap_ratio([[1.0], []], [[1.0], [1.0]], 0.95, seed=0)


@pytest.mark.parametrize("q", [50, 90, 99])
def test_percentile_interval_agrees_with_resampling_by_hand(q: float) -> None:
    rng = np.random.default_rng(7)
    blocks = [rng.lognormal(mean=rng.normal(scale=0.3), size=size) for size in rng.integers(5, 40, size=25)]
    interval = percentile_interval(blocks, q, 0.9, seed=0)
    by_hand = [
        np.percentile(np.concatenate([blocks[pick] for pick in rng.integers(25, size=25)]), q, method="inverted_cdf")
        for _ in range(2000)
    ]
    width = np.ptp(np.quantile(by_hand, [0.05, 0.95]))
    assert interval.value == np.percentile(np.concatenate(blocks), q, method="inverted_cdf")
    assert interval.low == pytest.approx(np.quantile(by_hand, 0.05), abs=0.15 * width)
    assert interval.high == pytest.approx(np.quantile(by_hand, 0.95), abs=0.15 * width)


def test_percentile_interval_knows_that_calls_of_a_block_are_alike() -> None:
    rng = np.random.default_rng(8)
    alike = [np.full(50, level) for level in rng.normal(10, 1, size=20)]
    shuffled = list(rng.permutation(np.concatenate(alike)).reshape(20, 50))
    together, apart = percentile_interval(alike, 50, 0.95, seed=0), percentile_interval(shuffled, 50, 0.95, seed=0)
    assert together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_rate_is_calls_per_time_over_all_blocks() -> None:
    interval = rate_interval([[1.0, 1.0], [4.0, 2.0]], 0.95, seed=0)
    assert (interval.low, interval.value, interval.high) == (pytest.approx(2 / 6), 0.5, 1.0)
    with pytest.raises(MeasurementError, match="at least one call"):
        rate_interval([], 0.95, seed=0)


def test_widening_adds_variances() -> None:
    unseen = 1.959964 * 0.01
    point = widened(Interval(value=2, low=2, high=2), 0.01, 0.95)
    assert (point.low, point.value, point.high) == pytest.approx((2 * exp(-unseen), 2, 2 * exp(unseen)))
    wide = widened(Interval(value=1, low=exp(-0.3), high=exp(0.4)), 0.01, 0.95)
    assert (log(wide.low), log(wide.high)) == pytest.approx((-sqrt(0.09 + unseen**2), sqrt(0.16 + unseen**2)))
    assert widened(wide, 0.0, 0.95) == Interval(value=1, low=pytest.approx(wide.low), high=pytest.approx(wide.high))
