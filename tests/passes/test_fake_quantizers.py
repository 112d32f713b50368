"""The maps to few bits and back, by hand, and the gradients that pass through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.passes.quantization.fake import (
    LogarithmicQuantizer,
    PowerOfTwoQuantizer,
    affine_quantizer,
    rounded,
)


def gradient(quantizer: torch.nn.Module, values: list[float]) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    quantizer(x).sum().backward()
    return x.grad.tolist()


def test_affine_map_by_hand() -> None:
    """Two bits over [-1, 2] are the levels -1, 0, 1 and 2."""
    quantizer = affine_quantizer(-1.0, 2.0, 2, symmetric=False)
    x = torch.tensor([-9.0, -1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.4, 1.6, 2.0, 9.0])
    assert quantizer(x).tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 2, 2, 2]


def test_symmetric_map_by_hand() -> None:
    """Three bits over [-6, 6]: steps of 2, and of the eight codes one is left."""
    quantizer = affine_quantizer(-6.0, 6.0, 3, symmetric=True)
    assert quantizer(torch.tensor([-9.0, -5.1, -0.9, 0.0, 1.1, 6.0, 7.0])).tolist() == [-6, -6, 0, 0, 2, 6, 6]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 16), low=st.floats(-50, -0.01), high=st.floats(0.01, 50))
def test_affine_map_equals_its_formula(bits: int, low: float, high: float) -> None:
    """q = round((x - min) / (max - min) * (2^b - 1)), back again, with the range moved so that zero is a level."""
    quantizer = affine_quantizer(low, high, bits, symmetric=False)
    levels, step = 2**bits - 1, (high - low) / (2**bits - 1)
    bottom = np.round(low / step) * step
    top = bottom + levels * step
    assert abs(bottom - low) <= step / 2 * 1.000001
    x = np.linspace(1.5 * low, 1.5 * high, 1001)
    position = (np.clip(x, bottom, top) - bottom) / (top - bottom) * levels
    expected = bottom + np.round(position) * (top - bottom) / levels
    given_ = quantizer(torch.tensor(x, dtype=torch.float64)).numpy()
    no_tie = np.abs(position % 1 - 0.5) > 0.01
    np.testing.assert_allclose(given_[no_tie], expected[no_tie], atol=1e-4 * (high - low) / levels + 1e-5 * step)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 16),
    low=st.floats(-50, 0),
    high=st.floats(0.01, 50),
    symmetric=st.booleans(),
)
def test_round_trip_is_within_half_a_step_and_zero_is_exact(
    bits: int, low: float, high: float, symmetric: bool
) -> None:
    low, high = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
    quantizer = affine_quantizer(low, high, bits, symmetric=symmetric)
    step = float(quantizer.step)
    x = torch.linspace(step * float(quantizer.first), step * float(quantizer.last), 1000)
    once = quantizer(x)
    assert (once - x).abs().max() <= step * 0.5 + 1e-6 * (high - low)
    assert torch.equal(quantizer(once), once)
    assert quantizer(torch.zeros(1)).item() == 0.0
    assert len(once.unique()) <= 2**bits


def test_every_channel_has_a_step_of_its_own() -> None:
    quantizer = affine_quantizer(np.array([-3.0, -300.0]), np.array([3.0, 300.0]), 3, symmetric=True, shape=(1, 2))
    assert quantizer(torch.tensor([[0.6, 60.0], [1.4, 40.0]])).tolist() == [[1, 100], [1, 0]]


def test_a_smaller_largest_integer_has_larger_steps() -> None:
    quantizer = affine_quantizer(-64.0, 64.0, 8, symmetric=True, last=64)
    x = torch.tensor([-70.0, -1.4, 0.6, 64.0])
    assert quantizer(x).tolist() == [-64, -1, 1, 64]


def test_gradient_passes_inside_of_the_range_and_not_outside() -> None:
    quantizer = affine_quantizer(-1.0, 2.0, 2, symmetric=False)
    assert gradient(quantizer, [-1.1, -1.0, -0.3, 0.0, 1.7, 2.0, 2.1]) == [0, 1, 1, 1, 1, 1, 0]


def test_gradient_of_a_learned_range_is_the_one_of_lsq() -> None:
    """round(x / s) - x / s inside, first or last outside, times s, as the scale is a logarithm."""
    quantizer = affine_quantizer(-2.0, 4.0, 2, symmetric=False, learned=True)
    for value, expected in ((1.5, (1 - 0.75) * 2), (2.6, (1 - 1.3) * 2), (9.0, 2 * 2), (-9.0, -1 * 2)):
        quantizer.zero_grad()
        quantizer(torch.tensor([value])).sum().backward()
        assert quantizer.log_scale.grad.item() == pytest.approx(expected, abs=1e-6)


def test_a_learned_range_settles_as_it_is() -> None:
    quantizer = affine_quantizer(-2.0, 4.0, 4, symmetric=False, learned=True)
    with torch.no_grad():
        quantizer.log_scale.fill_(0.3)
    x = torch.linspace(-5, 9, 100)
    settled = quantizer.settled()
    assert not list(settled.parameters())
    assert torch.equal(settled(x), quantizer(x))
    assert settled(torch.tensor([99.0])).item() > 4 * 1.3
    assert len(list(quantizer.parameters())) == 1


def test_rounding_is_exact_and_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 1e7 + 1], requires_grad=True)
    assert torch.equal(rounded(x), torch.round(x))
    rounded(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 1]


def test_logarithmic_map_by_hand() -> None:
    """Two bits over [0, 7]: log(a + 1) / log(8) * 3 is log2(a + 1), so the levels are 0, 1, 3 and 7."""
    quantizer = LogarithmicQuantizer(0.0, 7.0, 2)
    x = torch.tensor([-1.0, 0.0, 0.41, 0.42, 1.0, 1.82, 1.84, 3.0, 4.6, 4.7, 7.0, 99.0])
    torch.testing.assert_close(quantizer(x), torch.tensor([0.0, 0, 0, 1, 1, 1, 3, 3, 3, 7, 7, 7]), atol=1e-5, rtol=0)


def test_logarithmic_map_starts_at_its_minimum() -> None:
    """Over [-2, 5] the same levels, moved by -2."""
    quantizer = LogarithmicQuantizer(-2.0, 5.0, 2)
    torch.testing.assert_close(
        quantizer(torch.tensor([-9.0, -2.0, -1.0, 0.9, 5.0])), torch.tensor([-2.0, -2, -1, 1, 5]), atol=1e-5, rtol=0
    )


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 16), low=st.floats(-20, 0), span=st.floats(0.01, 100))
def test_logarithmic_round_trip_is_within_half_a_step_of_the_logarithm(bits: int, low: float, span: float) -> None:
    quantizer = LogarithmicQuantizer(low, low + span, bits)
    x = torch.linspace(low, low + span, 500, dtype=torch.float64)
    once = quantizer(x)
    logarithms = [torch.log((values - low + 1).clamp(min=1e-9)) for values in (x, once)]
    step = np.log(span + 1) / (2**bits - 1)
    assert (logarithms[0] - logarithms[1]).abs().max() <= step * 0.5 + 1e-4
    assert len(once.unique()) <= 2**bits


def test_logarithmic_gradient_is_the_maps_own() -> None:
    """(x' - min + 1) / (x - min + 1) inside, nothing outside; 1 on a level."""
    quantizer = LogarithmicQuantizer(0.0, 7.0, 2)
    expected = [0, 2 / 1.6, 1, 4 / 4.5, 0]
    assert gradient(quantizer, [-0.5, 0.6, 3.0, 3.5, 7.5]) == pytest.approx(expected, abs=1e-5)


def test_a_range_without_width_gives_its_only_value() -> None:
    assert LogarithmicQuantizer(0.0, 0.0, 4)(torch.zeros(3)).tolist() == [0, 0, 0]
    assert affine_quantizer(0.0, 0.0, 4, symmetric=False)(torch.zeros(3)).tolist() == [0, 0, 0]


def test_powers_of_two_by_hand() -> None:
    """Exponents 0, -1 and -2: |w| goes to 2^k from 3/4 to 3/2 of it, and to 0 below an eighth."""
    quantizer = PowerOfTwoQuantizer(torch.tensor(0.0), 3)
    weights = {9.0: 1.0, 1.1: 1.0, 0.76: 1.0, 0.74: 0.5, 0.38: 0.5, 0.37: 0.25, 0.13: 0.25, 0.12: 0.0, 0.0: 0.0}
    for sign in (1, -1):
        given_ = quantizer(sign * torch.tensor(list(weights))).tolist()
        assert given_ == [sign * power for power in weights.values()]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), largest=st.integers(-20, 20), seed=st.integers(0, 99))
def test_weights_become_zero_or_the_nearest_signed_power_of_two(bits: int, largest: int, seed: int) -> None:
    number = 2 ** (bits - 1) - 1
    quantizer = PowerOfTwoQuantizer(torch.tensor(float(largest)), number)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 2.0**largest / 2
    quantized = quantizer(weights)
    mantissas, exponents = torch.frexp(quantized.abs())
    assert set(mantissas.tolist()) <= {0.0, 0.5}
    assert (exponents[quantized != 0] - 1).max() <= largest
    assert (exponents[quantized != 0] - 1).min() > largest - number
    powers = [2.0**k for k in range(largest - number + 1, largest + 1)]
    levels = torch.tensor([0.0, *powers, *(-power for power in powers)], dtype=torch.float64)
    nearest = (weights.double()[:, None] - levels).abs().min(1).values
    torch.testing.assert_close((weights.double() - quantized).abs(), nearest)


def test_gradient_passes_through_powers_of_two_but_for_clipped_weights() -> None:
    quantizer = PowerOfTwoQuantizer(torch.tensor(0.0), 3)
    assert gradient(quantizer, [-1.6, -1.4, -0.3, 0.01, 0.7, 1.4, 1.6]) == [0, 1, 1, 1, 1, 1, 0]
