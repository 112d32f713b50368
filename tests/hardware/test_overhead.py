from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import MeasurementError
from hasten.hardware.overhead import CHAIN_INPUT_SHAPE, Overhead, chain, fit_overhead


def test_two_chains_give_call_and_operator() -> None:
    # 15 us a call and 2.5 us an operator: 15 + 4 * 2.5 = 25 and 15 + 24 * 2.5 = 75.
    fitted = fit_overhead([4, 24], [25.0, 75.0])
    assert fitted.call_us == pytest.approx(15.0)
    assert fitted.operator_us == pytest.approx(2.5)


def test_more_chains_are_fitted_by_least_squares() -> None:
    lengths, latencies = [2, 8, 16, 32], [30.0, 44.0, 70.0, 109.0]
    slope, intercept = np.polyfit(lengths, latencies, 1)
    assert fit_overhead(lengths, latencies).operator_us == pytest.approx(slope)
    assert fit_overhead(lengths, latencies).call_us == pytest.approx(intercept)


def test_noise_never_makes_a_cost_negative() -> None:
    assert fit_overhead([4, 24], [30.0, 28.0]) == Overhead(call_us=29.0, operator_us=0.0)
    # The line through (4, 1) and (24, 41) starts at -7; through the origin it is (4 * 1 + 24 * 41) / (16 + 576).
    assert fit_overhead([4, 24], [1.0, 41.0]) == Overhead(call_us=0.0, operator_us=988 / 592)


@given(call_us=st.floats(0.1, 1e4), operator_us=st.floats(0.01, 1e3), lengths=st.sets(st.integers(1, 99), min_size=2))
def test_every_exact_line_is_found(call_us: float, operator_us: float, lengths: set[int]) -> None:
    fitted = fit_overhead(sorted(lengths), [call_us + length * operator_us for length in sorted(lengths)])
    assert fitted.call_us == pytest.approx(call_us, rel=1e-6, abs=1e-6 * 99 * operator_us)
    assert fitted.operator_us == pytest.approx(operator_us, rel=1e-6, abs=1e-6 * call_us)


@pytest.mark.parametrize(
    ("lengths", "latencies"), [([4], [25.0]), ([4, 4], [25.0, 26.0]), ([4, 24], [25.0]), ([4, 24], [0.0, 9.0])]
)
def test_refuses_what_gives_no_line(lengths: list[float], latencies: list[float]) -> None:
    with pytest.raises(MeasurementError):
        fit_overhead(lengths, latencies)


def test_a_chain_is_as_long_as_asked_and_equals_one_relu() -> None:
    rows = torch.randn(2, *CHAIN_INPUT_SHAPE)
    module = chain(7)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in module.modules()) == 7
    assert torch.equal(module(rows), rows.relu())
    assert not module.training
