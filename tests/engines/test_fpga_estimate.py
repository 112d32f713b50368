"""The analytic estimate against values computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.engines.fpga_estimate import Layer, dsps_of_product, estimate, of_layer

LAYER = Layer(
    name="dense",
    inputs=16,
    outputs=32,
    places=1,
    nonzero=500,
    input_bits=16,
    weight_bits=16,
    sum_bits=36,
    scales=0,
    scale_bits=18,
)


@pytest.mark.parametrize(
    ("first", "second", "slices"),
    [
        (9, 18, 0),  # look-up tables
        (10, 18, 1),
        (18, 27, 1),
        (27, 18, 1),
        (19, 27, 2),  # 18 + 1 bits
        (18, 28, 2),
        (32, 32, 4),
        (36, 18, 2),
    ],
)
def test_counts_the_slices_of_a_product(first: int, second: int, slices: int) -> None:
    assert dsps_of_product(first, second) == slices


def test_gives_every_product_that_is_not_zero_a_multiplier() -> None:
    found = of_layer(LAYER, 1, "latency")
    assert (found.multipliers, found.dsps, found.luts, found.block_rams) == (500, 500, 500 * 36, 0)
    assert (found.interval, found.cycles) == (1, 3 + 4 + 1)  # multiplier, 16 terms, rounding


def test_shares_multipliers_by_the_reuse_factor() -> None:
    found = of_layer(LAYER, 4, "resource")
    assert (found.multipliers, found.dsps) == (16 * 32 // 4, 128)
    assert found.block_rams == 57  # 128 weights of 16 bits side by side, 36 bits a memory
    assert (found.interval, found.cycles) == (4, 3 + 8)


def test_makes_narrow_products_of_look_up_tables_and_scales_of_slices() -> None:
    narrow = replace(LAYER, input_bits=6, weight_bits=4, sum_bits=14, scales=32)
    found = of_layer(narrow, 1, "latency")
    assert (found.dsps, found.multipliers) == (32, 532)
    assert found.luts == 500 * (6 * 4 + 14)
    assert found.cycles == 3 + 4 + 1 + 3


def test_adds_layers_one_after_the_other_and_overlaps_those_in_a_stream() -> None:
    convolution = replace(LAYER, name="convolution", places=64)
    layers, factors = (convolution, LAYER), {"convolution": 2, "dense": 4}
    parallel = estimate(layers, factors, "latency", streamed=False, clock_ns=5)
    assert parallel.cycles == (128 + 7) + (4 + 7)
    assert parallel.interval == 128
    assert parallel.latency_us == pytest.approx(146 * 0.005)
    assert parallel.rows_per_second == pytest.approx(1e9 / 640)
    streamed = estimate(layers, factors, "latency", streamed=True, clock_ns=5)
    assert streamed.cycles == 128 + 7 + 7
    assert streamed.dsps == parallel.dsps == 256 + 128
