from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.passes.quantization.ranges import Histogram, channel_ranges, fake_quantized, grid

METHODS = ("minmax", "percentile", "mse", "entropy")


def histogram(*batches: np.ndarray) -> Histogram:
    counted = Histogram()
    for batch in batches:
        counted.observe(batch)
    return counted


def tailed(number: int = 20000, seed: int = 0) -> np.ndarray:
    """Normal values with a few far out, as activations have them."""
    values = np.random.default_rng(seed).standard_normal(number)
    values[:: number // 10] *= 20
    return values.astype(np.float32)


def test_minmax_is_exact_and_includes_zero() -> None:
    assert histogram(np.array([0.3, 7.7]), np.array([[2.1], [1.5]])).range("minmax") == (0.0, 7.7)
    assert histogram(np.array([-0.3, 7.7])).range("minmax") == (-0.3, 7.7)
    assert histogram(np.array([-9.5, -1.0])).range("minmax") == (-9.5, 0.0)
    assert histogram(np.array([-0.3, 7.7])).range("minmax", symmetric=True) == (-7.7, 7.7)


def test_takes_tensors() -> None:
    assert histogram(torch.tensor([[-2.0, 3.0]])).range("minmax") == (-2.0, 3.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_batches_in_any_order_and_merged_histograms_give_the_same_range(method: str, symmetric: bool) -> None:
    values = tailed() * np.linspace(1e-3, 5, 20000, dtype=np.float32)
    whole = histogram(values)
    parts = [histogram(part) for part in np.array_split(values, 7)]
    for part in parts[1:]:
        parts[0].merge(part)
    wanted = whole.range(method, 4, symmetric=symmetric)
    assert histogram(*np.array_split(values[::-1], 5)).range(method, 4, symmetric=symmetric) == wanted
    assert parts[0].range(method, 4, symmetric=symmetric) == wanted


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_equals_numpys_quantiles(percentile: float, sign: int) -> None:
    values = sign * (tailed() + 0.5)
    outside = (100 - percentile) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    assert histogram(values).range("percentile", percentile=percentile) == pytest.approx((low, high), rel=0.03)
    high = np.percentile(np.abs(values), percentile)
    found = histogram(values).range("percentile", symmetric=True, percentile=percentile)
    assert found == pytest.approx((-high, high), rel=0.03)


def test_percentile_counts_zeros() -> None:
    """Of 1000 values 990 are zero; the upper half percent are 5 of the ten others."""
    values = np.concatenate([np.zeros(990), np.arange(1, 11)])
    low, high = histogram(values).range("percentile", percentile=99.0)
    assert low == 0
    assert high == pytest.approx(5.5, abs=0.6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_least_squared_error_of_all_clippings(bits: int, symmetric: bool) -> None:
    values = tailed().astype(np.float64)

    def error(low: float, high: float) -> float:
        return float(np.mean((fake_quantized(values, low, high, bits, symmetric=symmetric) - values) ** 2))

    low, high = histogram(values).range("mse", bits, symmetric=symmetric)
    largest = float(np.abs(values).max())
    by_search = min(error(-clip, clip) for clip in np.linspace(0.01, 1, 300) * largest)
    assert error(low, high) <= 1.02 * by_search
    assert (low == -high) or not symmetric


def test_mse_clips_more_the_fewer_bits_there_are() -> None:
    counted = histogram(tailed())
    highs = [counted.range("mse", bits, symmetric=True)[1] for bits in (2, 3, 4, 6, 8)]
    assert highs == sorted(highs)
    assert highs[0] < 0.2 * counted.high


def test_mse_at_two_bits_by_hand() -> None:
    """Levels -h, 0, h: ninety values of 1 and one of 2 want h = (90 + 2) / 91, up to the search's step."""
    counted = histogram(np.array([1.0, -1.0] * 45 + [2.0]))
    assert counted.range("mse", 2, symmetric=True)[1] == pytest.approx(92 / 91, rel=0.06)


def test_entropy_clips_outliers_and_keeps_a_flat_distribution_whole() -> None:
    outliers = np.append(np.abs(np.random.default_rng(0).standard_normal(50000)), [40.0])
    low, high = histogram(outliers).range("entropy", 8)
    assert low == 0
    assert 2 < high < 20
    flat = np.linspace(0, 1, 50000)
    assert histogram(flat).range("entropy", 8)[1] == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros_has_an_empty_range(method: str) -> None:
    assert histogram(np.zeros(5)).range(method) == (0.0, 0.0)
    assert Histogram().range(method) == (0.0, 0.0)
    assert fake_quantized(np.zeros(2), 0.0, 0.0, 4, symmetric=False).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="values have to be finite to be counted, got NaN or infinity"):
        histogram(np.array([1.0, bad]))


def test_every_channel_has_a_range_of_its_own() -> None:
    weight = np.stack([tailed(500, seed) * (seed + 1) for seed in range(3)])
    low, high = channel_ranges(weight, "minmax", axis=0)
    np.testing.assert_array_equal(high, np.abs(weight).max(1))
    np.testing.assert_array_equal(low, -high)
    for method in METHODS:
        of_channels = channel_ranges(weight.T, method, 4, axis=1)
        for channel, ends in enumerate(zip(*of_channels, strict=True)):
            assert ends == histogram(weight[channel]).range(method, 4, symmetric=True)
    low, high = channel_ranges(weight, "minmax", axis=None, symmetric=False)
    assert (low.tolist(), high.tolist()) == ([weight.min()], [weight.max()])


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_a_range_holds_zero_on_its_grid_and_nothing_that_was_not_seen(
    values: list[float], bits: int, symmetric: bool, method: str
) -> None:
    counted = histogram(np.array(values[: len(values) // 2]), np.array(values[len(values) // 2 :]))
    low, high = counted.range(method, bits, symmetric=symmetric)
    largest = max(map(abs, values))
    assert (-largest if symmetric else min(0.0, *values)) <= low <= 0 <= high
    assert high <= (largest if symmetric else max(0.0, *values))
    assert low == -high or not symmetric
    step, first, last = grid(low, high, bits, symmetric=symmetric)
    assert step > 0
    assert first <= 0 <= last
    assert last - first == 2**bits - (2 if symmetric else 1)
