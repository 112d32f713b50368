from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq, minimize_scalar

from hasten.core.errors import EngineError, MeasurementError
from hasten.core.trial import Drop, Interval
from hasten.evidence import bounds
from hasten.evidence.bounds import (
    better_than_chance,
    bootstrap_ratio,
    class_drops,
    corrected,
    paired_drop,
    percentile_interval,
    rate_interval,
    relative_drop,
    rows_to_certify,
    score_bound,
    smallest_certifiable,
    statistic_drop,
    widened,
)
from hasten.evidence.metrics import macro_f1, spearman

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


def test_each_class_is_compared_on_its_own_rows() -> None:
    baseline = np.array([1.0, 1, 1, 1, 0, 1, 1])
    candidate = np.array([1.0, 0, 1, 1, 1, 0, 0])
    labels = np.array([3, 3, 0, 0, 0, 1, 1])
    drops = class_drops(baseline, candidate, labels, 0.9)
    assert list(drops) == [0, 1, 3]
    assert [drop.value for drop in drops.values()] == pytest.approx([-1 / 3, 1, 0.5])
    assert drops[3] == paired_drop([1, 1], [1, 0], 0.9)


def test_no_class_drops_without_rows_of_it() -> None:
    with pytest.raises(MeasurementError, match="paired comparison"):
        class_drops([1.0, 0.0], [1.0, 0.0], [0], 0.95)


def test_claiming_that_no_class_lost_more_than_the_margin_errs_as_rarely_as_one_class_would() -> None:
    rng = np.random.default_rng(10)
    labels = np.repeat(np.arange(3), 60)
    # One class loses exactly the margin, the others nothing: the hardest case in which the claim is wrong.
    claimed = []
    for _ in range(300):
        candidate = (rng.random(180) >= 0.1 * (labels == 0)).astype(float)
        claimed.append(max(drop.bound for drop in class_drops(np.ones(180), candidate, labels, 0.9).values()) < 0.1)
    assert np.mean(claimed) <= 0.1 + 0.05


def test_a_relative_drop_is_a_share_of_the_baselines_mean() -> None:
    rng = np.random.default_rng(11)
    errors = rng.exponential(size=200)
    worse = relative_drop(errors, errors * rng.uniform(1.0, 1.2, size=200), 0.95, higher_is_better=False)
    assert worse.value == pytest.approx(0.1, abs=0.02)
    assert worse.value < worse.bound < worse.value + 0.03
    assert (worse.rows, worse.confidence) == (200, 0.95)
    better = relative_drop(errors, 0.5 * errors, 0.95, higher_is_better=False)
    assert better.value == pytest.approx(-0.5)
    assert relative_drop(errors, 0.5 * errors, 0.95, higher_is_better=True).value == pytest.approx(0.5)


def test_a_share_that_every_row_lost_is_certain() -> None:
    errors = np.random.default_rng(12).exponential(size=100)
    assert relative_drop(errors, 1.1 * errors, 0.95, higher_is_better=False).bound == pytest.approx(0.1, abs=1e-6)


def test_the_relative_bound_of_many_rows_is_fiellers() -> None:
    rng = np.random.default_rng(13)
    baseline = rng.normal(5, 1, size=1000)
    candidate = baseline - rng.normal(0.5, 0.5, size=1000)
    t = stats.t.ppf(0.95, 999)

    def lower_end(share: float) -> float:
        contrast = baseline - candidate - share * baseline
        return contrast.mean() + t * stats.sem(contrast)

    fieller = brentq(lower_end, 0.0, 1.0)
    drop = relative_drop(baseline, candidate, 0.95, higher_is_better=True)
    assert drop.bound - drop.value == pytest.approx(fieller - drop.value, rel=0.05)


def test_a_relative_drop_does_not_know_the_unit() -> None:
    rng = np.random.default_rng(14)
    baseline, candidate = rng.exponential(size=(2, 80))
    here = relative_drop(baseline, candidate, 0.95, higher_is_better=False)
    there = relative_drop(1e6 * baseline, 1e6 * candidate, 0.95, higher_is_better=False)
    assert (there.value, there.bound) == pytest.approx((here.value, here.bound))


@pytest.mark.parametrize("changed", [0, 1, 3])
def test_few_changed_rows_are_no_certainty_for_a_relative_drop_either(changed: int) -> None:
    baseline, candidate = rows(changed, 0, 200)
    drop = relative_drop(baseline, candidate, 0.95, higher_is_better=True)
    assert drop.value == pytest.approx(changed / 200)
    assert drop.bound >= score_bound(changed, 0, 200, 0.95) * 0.99


@pytest.mark.parametrize("baseline", [[0.0, 0.0, 0.0], [-1.0, -2.0, -1.0], [1.0, -1.1, 0.3]])
def test_refuses_a_share_of_what_may_be_nothing(baseline: list[float]) -> None:
    with pytest.raises(MeasurementError, match="a relative drop needs a baseline that is surely above 0"):
        relative_drop(baseline, [0.1, 0.2, 0.3], 0.95, higher_is_better=False)


def covered(confidence: float, draw: Callable[[], tuple[Drop, float]], times: int) -> None:
    """Checks that the bound is below the truth no more often than it says, but for 2 deviations of so few draws."""
    drops = [draw() for _ in range(times)]
    share = np.mean([drop.bound >= truth - 1e-12 for drop, truth in drops])
    assert share >= confidence - 0.03


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "NUM_ROW_RESAMPLES", 1000)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_a_relative_drop_of_squared_errors_is_covered(noise: float) -> None:
    rng = np.random.default_rng(15)

    def draw() -> tuple[Drop, float]:
        errors = rng.normal(size=100)
        worse = errors + noise * rng.normal(size=100)
        return relative_drop(errors**2, worse**2, 0.95, higher_is_better=False), noise**2

    covered(0.95, draw, 300)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.0), (0.06, 0.2)])
def test_a_relative_drop_of_an_accuracy_is_covered(lost: float, gained: float) -> None:
    rng = np.random.default_rng(16)

    def draw() -> tuple[Drop, float]:
        baseline, chance = rng.random(150) < 0.9, rng.random(150)
        candidate = np.where(baseline, chance >= lost, chance < gained)
        truth = (0.9 * lost - 0.1 * gained) / 0.9
        return relative_drop(baseline, candidate, 0.95, higher_is_better=True), truth

    covered(0.95, draw, 300)


def mean_error(outputs: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    return float(np.mean(np.abs(outputs - targets)))


@pytest.mark.parametrize("relative", [False, True])
def test_a_statistic_that_is_a_mean_drops_as_its_rows_do(relative: bool) -> None:
    rng = np.random.default_rng(17)
    targets, baseline, candidate = rng.normal(size=(3, 60))
    targets[0] = baseline[0]  # one error of 0, as a mean of errors may have
    drop = statistic_drop(mean_error, baseline, candidate, targets, 0.95, higher_is_better=False, relative=relative)
    before, after = np.abs(baseline - targets), np.abs(candidate - targets)
    if relative:
        expected = relative_drop(before, after, 0.95, higher_is_better=False)
    else:
        expected = paired_drop(-before, -after, 0.95)
    assert (drop.value, drop.bound) == pytest.approx((expected.value, expected.bound))
    assert (drop.rows, drop.confidence) == (60, 0.95)


def test_higher_and_lower_statistics_are_two_sides_of_one_drop() -> None:
    rng = np.random.default_rng(18)
    targets, baseline, candidate = rng.normal(size=(3, 40))
    lower = statistic_drop(mean_error, baseline, candidate, targets, 0.95, higher_is_better=False, relative=False)
    higher = statistic_drop(
        lambda outputs, wanted: -mean_error(outputs, wanted),
        baseline,
        candidate,
        targets,
        0.95,
        higher_is_better=True,
        relative=False,
    )
    assert (lower.value, lower.bound) == pytest.approx((higher.value, higher.bound))


def test_groups_of_rows_bound_a_statistic_nearly_as_single_rows_do() -> None:
    rng = np.random.default_rng(19)
    targets = rng.normal(size=603)
    baseline = targets + 0.5 * rng.normal(size=603)
    candidate = baseline + 0.3 * rng.normal(size=603)
    single, grouped = (
        statistic_drop(
            spearman, baseline, candidate, targets, 0.95, higher_is_better=True, relative=False, groups=groups
        )
        for groups in (2000, 200)
    )
    assert single.value == grouped.value
    assert grouped.bound - grouped.value == pytest.approx(single.bound - single.value, rel=0.2)


@pytest.mark.parametrize("wrong", [0, 10])
def test_a_statistic_of_equal_outputs_drops_by_nothing_and_claims_no_certainty(wrong: int) -> None:
    labels = np.arange(100) % 2
    outputs = np.eye(2)[np.where(np.arange(100) < wrong, 1 - labels, labels)]
    drop = statistic_drop(macro_f1, outputs, outputs.copy(), labels, 0.95, higher_is_better=True, relative=False)
    assert drop.value == 0
    assert 0.8 * smallest_certifiable(100, 0.95) < drop.bound < 2 * smallest_certifiable(100, 0.95)


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("wrong", "gained"), [(0.04, 0.0), (0.15, 0.05)])
def test_the_drop_of_an_f1_is_covered(wrong: float, gained: float) -> None:
    rng = np.random.default_rng(20)

    def outputs(num_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        labels = (rng.random(num_rows) < 0.3).astype(np.int64)
        baseline = np.where(rng.random(num_rows) < 0.9, labels, 1 - labels)
        candidate = np.where(rng.random(num_rows) < wrong, 0, baseline)
        candidate = np.where(rng.random(num_rows) < gained, labels, candidate)
        return np.eye(2)[baseline], np.eye(2)[candidate], labels

    baseline, candidate, labels = outputs(300_000)
    truth = macro_f1(baseline, labels) - macro_f1(candidate, labels)

    def draw() -> tuple[Drop, float]:
        return statistic_drop(macro_f1, *outputs(100), 0.95, higher_is_better=True, relative=False), truth

    covered(0.95, draw, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("noise", "share"), [(0.3, 1.0), (2.0, 0.03)])
def test_the_drop_of_a_rank_correlation_is_covered(noise: float, share: float) -> None:
    rng = np.random.default_rng(21)

    def outputs(num_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        targets, first, second = rng.normal(size=(3, num_rows))
        baseline = targets + 0.5 * first
        return baseline, baseline + noise * second * (rng.random(num_rows) < share), targets

    baseline, candidate, targets = outputs(300_000)
    truth = spearman(baseline, targets) - spearman(candidate, targets)

    def draw() -> tuple[Drop, float]:
        return statistic_drop(spearman, *outputs(80), 0.95, higher_is_better=True, relative=False), truth

    covered(0.95, draw, 250)


def test_a_statistic_that_hangs_on_one_row_is_no_evidence() -> None:
    targets = np.array([0.0, 0.0, 0.0, 1.0])
    outputs = np.arange(4.0)
    with pytest.raises(MeasurementError, match=r"can't be computed without 1 of 4 rows: spearman needs targets that"):
        statistic_drop(spearman, outputs, outputs, targets, 0.95, higher_is_better=True, relative=False)


def test_a_statistic_without_a_value_is_refused() -> None:
    ones = np.ones(4)
    with pytest.raises(MeasurementError, match="the metric is nan"):
        statistic_drop(lambda _, __: np.nan, ones, ones, ones, 0.95, higher_is_better=True, relative=False)
    with pytest.raises(EngineError, match="spearman needs targets"):
        statistic_drop(spearman, ones, ones, ones, 0.95, higher_is_better=True, relative=False)


def test_refuses_a_statistic_of_rows_that_are_no_pairs() -> None:
    with pytest.raises(MeasurementError, match="got 3 and 4 for 4 targets"):
        statistic_drop(spearman, np.ones(3), np.ones(4), np.ones(4), 0.95, higher_is_better=True, relative=False)
    with pytest.raises(MeasurementError, match="at least 2 of them, got 1 and 1 for 1 targets"):
        statistic_drop(spearman, np.ones(1), np.ones(1), np.ones(1), 0.95, higher_is_better=True, relative=False)


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
