from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.planning.bisection import max_values, next_value

SPARSITY = {"key": "pruning.sparsity", "low": 0.25, "high": 0.75, "tolerance": 0.15}


def searched(search: dict[str, Any], threshold: float) -> list[tuple[float, bool]]:
    """All that is observed where exactly the values up to the threshold are admissible."""
    observed: list[tuple[float, bool]] = []
    while (value := next_value(search, observed)) is not None:
        observed.append((value, value <= threshold))
    return observed


def test_tries_low_then_high_then_halves_the_gap() -> None:
    # 0.25 holds, 0.75 and 0.5 don't, 0.37 does; 0.50 - 0.37 = 0.13 is close enough.
    assert searched(SPARSITY, 0.4) == [(0.25, True), (0.75, False), (0.5, False), (0.37, True)]


def test_is_over_where_low_is_refused() -> None:
    assert searched(SPARSITY, 0.1) == [(0.25, False)]


def test_is_over_where_high_holds() -> None:
    assert searched(SPARSITY, 0.9) == [(0.25, True), (0.75, True)]


def test_a_range_of_one_value_is_tried_once() -> None:
    assert searched({**SPARSITY, "high": 0.25}, 0.9) == [(0.25, True)]


def test_the_order_of_observations_does_not_matter() -> None:
    assert next_value(SPARSITY, [(0.75, False), (0.5, True), (0.25, True)]) == 0.62
    assert next_value(SPARSITY, [(0.25, True), (0.5, True), (0.75, False)]) == 0.62


def test_goes_on_above_a_refusal_that_a_larger_value_contradicts() -> None:
    assert next_value(SPARSITY, [(0.25, True), (0.3, False), (0.5, True), (0.75, False)]) == 0.62


HUNDREDTHS = st.integers(0, 100).map(lambda value: value / 100)


@given(bounds=st.tuples(HUNDREDTHS, HUNDREDTHS), tolerance=st.floats(0.001, 0.5), threshold=st.floats(-0.1, 1.1))
def test_ends_within_the_tolerance_of_any_threshold(
    bounds: tuple[float, float], tolerance: float, threshold: float
) -> None:
    low, high = min(bounds), max(bounds)
    search = {"key": "k", "low": low, "high": high, "tolerance": tolerance}
    observed = searched(search, threshold)
    values = [value for value, _ in observed]
    assert len(set(values)) == len(values) <= max_values(search)
    assert all(low <= value <= high and value == round(value, 2) for value in values)
    held = [value for value, admissible in observed if admissible]
    refused = [value for value, admissible in observed if not admissible]
    if threshold < low:
        assert not held
    elif threshold >= high:
        assert max(held) == high
    else:
        assert max(held) <= threshold < min(refused)
        assert min(refused) - max(held) <= max(tolerance, 0.01) + 1e-9


@given(low=st.floats(0, 1), high=st.floats(0, 1), threshold=st.floats(0, 1))
def test_never_leaves_a_range_with_more_decimals(low: float, high: float, threshold: float) -> None:
    if high - low >= 0.01:
        values = [value for value, _ in searched({"low": low, "high": high, "tolerance": 0.1}, threshold)]
        assert all(low - 1e-8 <= value <= high + 1e-8 for value in values)


def test_the_number_of_values_is_reached() -> None:
    assert max(len(searched(SPARSITY, threshold / 100)) for threshold in range(100)) == max_values(SPARSITY)


@pytest.mark.parametrize(
    "search",
    [
        {"low": 0.8, "high": 0.2, "tolerance": 0.1},
        {"low": 0.2, "high": 0.8, "tolerance": 0.0},
        {"low": 0.2, "high": 0.8},
        {"low": "much", "high": 0.8, "tolerance": 0.1},
        {"low": 0.2, "high": float("inf"), "tolerance": 0.1},
        {"low": float("nan"), "high": 0.8, "tolerance": 0.1},
    ],
)
def test_refuses_a_search_without_a_range(search: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="search"):
        next_value(search, [])
