"""Fixed-point types against hand-made values, and grids against the integers that they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engines.fixed_point import Fixed, exact, levels, reaching


@pytest.mark.parametrize(
    ("values", "width", "integer"),
    [
        ([0.25, -1.5], 4, 2),  # -2 to 1.75 in quarters
        ([3.0, -4.0], 4, 4),  # 4 needs a bit more than -4
        ([1024.0], 2, 12),  # zeros below the binary point cost nothing
        ([0.0], 1, 1),
    ],
)
def test_finds_the_narrowest_type_of_exact_values(values: list[float], width: int, integer: int) -> None:
    found = exact(np.array(values), 16)
    assert found == Fixed(width=width, integer=integer)
    np.testing.assert_array_equal(found.rounded(np.array(values)), values)


def test_says_that_no_narrow_type_holds_a_third() -> None:
    assert exact(np.array([1 / 3], np.float32), 16) is None


def test_places_the_binary_point_where_the_largest_value_fits() -> None:
    assert reaching(1.0, 8) == Fixed(width=8, integer=2)  # 0.99 would do with 1
    assert reaching(0.99, 8) == Fixed(width=8, integer=1)
    assert reaching(0.1, 8, signed=False) == Fixed(width=8, integer=-3, signed=False)


def test_rounds_half_to_even_and_clips() -> None:
    quarters = Fixed(width=4, integer=2, saturates=True)
    np.testing.assert_array_equal(quarters.rounded(np.array([0.125, 0.375, 5, -5])), [0.0, 0.5, 1.75, -2.0])
    assert str(quarters) == "fixed<4,2,RND_CONV,SAT>"
    assert str(Fixed(width=4, integer=4, saturates=True, symmetric=True)) == "fixed<4,4,RND_CONV,SAT_SYM>"
    assert str(Fixed(width=8, integer=0, signed=False)) == "ufixed<8,0>"


@settings(deadline=None, max_examples=50)
@given(
    integers=st.lists(st.integers(-127, 127), min_size=1, max_size=40).filter(any),
    step=st.floats(0.0001, 10),
    gain=st.floats(0.1, 3),
)
def test_finds_the_grid_of_weights_whatever_was_folded_into_them(integers: list[int], step: float, gain: float) -> None:
    weights = (np.float32(step) * np.array([integers], np.float32)) * np.float32(gain)
    found = levels(weights)
    assert found is not None
    np.testing.assert_allclose(found[0] * found[1][:, None], weights, rtol=1e-5)
    common = np.gcd.reduce(integers)
    np.testing.assert_array_equal(found[0][0], np.array(integers) // common)


def test_finds_no_grid_in_weights_that_were_never_rounded() -> None:
    assert levels(np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)) is None
