"""Whether a changed training learns as the baseline does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import MeasurementError
from hasten.evidence.learning import SEGMENTS, compare

STEPS = 50


def curves(seeds: int, level: float = 1.0, spread: float = 0.05, first: int = 0) -> list[list[float]]:
    """Falling losses whose means differ from seed to seed."""
    falling = level * np.linspace(2.0, 1.0, STEPS)
    shifts = [np.random.default_rng(first + seed).normal(0, spread) for seed in range(seeds)]
    return [(falling * (1 + shift)).tolist() for shift in shifts]


def test_the_limit_is_that_of_a_prediction_interval_worked_by_hand() -> None:
    # Constant losses 1.0 and 1.2 have the mean 1.1, the deviation 0.1414, and 1 degree of freedom. With 5 segments at
    # 0.95 the quantile of Student's t is tan(pi * (0.99 - 0.5)) = 31.82 (a Cauchy distribution).
    found = compare([[1.0] * 10, [1.2] * 10], [[1.1] * 10], batch_sizes=(4, 4), confidence=0.95)
    limit = 1.1 + math.tan(math.pi * 0.49) * math.sqrt(0.02) * math.sqrt(1 / 2 + 1)
    assert found.limit == pytest.approx([limit] * SEGMENTS)
    assert found.baseline == pytest.approx([1.1] * SEGMENTS)
    assert found.rows == (8, 16, 24, 32, 40)
    assert found.num_seeds == (2, 1)


def test_the_same_losses_hold() -> None:
    before = curves(4)
    found = compare(before, before[:2], batch_sizes=(32, 32), confidence=0.95)
    assert found.holds
    assert found.reason.startswith("within the seeds' spread up to row")


def test_equal_seeds_allow_nothing_more() -> None:
    same = [[1.0] * STEPS] * 3
    assert compare(same, [[1.0] * STEPS], batch_sizes=(1, 1), confidence=0.95).holds
    assert not compare(same, [[1.001] * STEPS], batch_sizes=(1, 1), confidence=0.95).holds


def test_a_loss_that_stays_up_does_not_hold_and_says_where() -> None:
    late = [[*curve[:40], *(2 * loss for loss in curve[40:])] for curve in curves(1)]
    found = compare(curves(6), late, batch_sizes=(10, 10), confidence=0.95)
    assert not found.holds
    assert found.reason.startswith("outside the seeds' spread up to row 500: loss ")


def test_less_loss_is_nothing_to_hold_against_it() -> None:
    assert compare(curves(4), curves(1, level=0.2), batch_sizes=(1, 1), confidence=0.95).holds


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_never_holds(broken: float) -> None:
    after = curves(1)
    after[0][-1] = broken
    assert not compare(curves(4), after, batch_sizes=(1, 1), confidence=0.95).holds


def test_another_batch_size_is_compared_at_the_same_rows() -> None:
    fewer_steps = [curve[::5] for curve in curves(1)]
    found = compare(curves(4), fewer_steps, batch_sizes=(32, 160), confidence=0.95)
    assert found.holds
    assert found.rows[-1] == 32 * STEPS


@settings(max_examples=25, deadline=None)
@given(st.integers(min_value=0, max_value=10_000))
def test_another_seed_of_the_baseline_is_hardly_ever_rejected(first: int) -> None:
    every = [
        compare(
            curves(4, first=first + 100 * k), curves(1, first=first + 100 * k + 50), batch_sizes=(1, 1), confidence=0.95
        ).holds
        for k in range(40)
    ]
    assert sum(every) >= 30  # of 40 at 0.95, one in 10^5 has fewer than 33


def test_one_seed_tells_no_spread() -> None:
    with pytest.raises(MeasurementError, match="2 seeds of the baseline"):
        compare(curves(1), curves(1), batch_sizes=(1, 1), confidence=0.95)


def test_a_curve_shorter_than_its_segments_is_refused() -> None:
    with pytest.raises(MeasurementError, match="at least 5 steps, got 3"):
        compare([[1.0] * 3] * 2, [[1.0] * 3], batch_sizes=(1, 1), confidence=0.95)
