"""By hand: 100 GFLOP/s (400 in integers), L1 of 32 kB at 100 GB/s, L2 of 1 MB at 50 GB/s, DRAM at 10 GB/s."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.profiling.roofline import Demand, Roofs, demands, place, width

ROOFS = Roofs(
    peak_gops={"float32": 100.0, "bfloat16": 200.0, "int8": 400.0},
    bandwidth_gbs={"L1": 100.0, "L2": 50.0, "DRAM": 10.0},
    capacity_bytes={"L1": 32_000, "L2": 1_000_000},
)


@pytest.mark.parametrize(("num_bytes", "level"), [(0, "L1"), (32_000, "L1"), (32_001, "L2"), (1_000_001, "DRAM")])
def test_a_working_set_lives_in_the_nearest_level_that_holds_it(num_bytes: int, level: str) -> None:
    assert ROOFS.level(num_bytes) == level


def test_a_machine_without_known_caches_reads_from_memory() -> None:
    bare = Roofs.from_dict({"peak_gops": {"float32": 1.0}, "bandwidth_gbs": {"DRAM": 10.0}, "capacity_bytes": {}})
    assert bare.memory_ms(1_000_000, working_set_bytes=1) == pytest.approx(0.1)
    assert bare.peak("int8") == bare.peak("float16") == bare.peak("float32") == 1.0


def test_much_arithmetic_on_few_bytes_is_bound_by_compute() -> None:
    # 50 MFLOP at 100 GFLOP/s: 0.5 ms. 20 kB of weights of a model of 500 kB from L2: 0.4 us; 60 kB of activations of
    # three operators, 20 kB each, from L1: 0.6 us.
    demand = Demand(flops=50_000_000, weight_bytes=20_000, activation_bytes=60_000, calls=3)
    placed = place(demand, ROOFS, resident_bytes=500_000)
    assert placed.compute_ms == pytest.approx(0.5)
    assert placed.memory_ms == pytest.approx(0.001)
    assert (placed.bound, placed.roof_ms) == ("compute", placed.compute_ms)


def test_weights_that_no_cache_holds_are_bound_by_memory() -> None:
    # 4 MB at 10 GB/s: 0.4 ms; 2 MFLOP: 0.02 ms.
    placed = place(Demand(flops=2_000_000, weight_bytes=4_000_000), ROOFS, resident_bytes=4_000_000)
    assert placed.memory_ms == pytest.approx(0.4)
    assert (placed.bound, placed.roof_ms) == ("memory", placed.memory_ms)


def test_the_weights_of_one_layer_come_from_where_all_weights_live() -> None:
    alone = place(Demand(weight_bytes=10_000), ROOFS, resident_bytes=10_000)
    among_others = place(Demand(weight_bytes=10_000), ROOFS, resident_bytes=2_000_000)
    assert among_others.memory_ms == pytest.approx(10 * alone.memory_ms)


def test_what_calculates_nothing_is_bound_by_memory() -> None:
    assert place(Demand(), ROOFS, resident_bytes=0).bound == "memory"


def test_integer_arithmetic_has_its_own_peak() -> None:
    # Half of 100 MFLOP at 100 GFLOP/s and half at 400: 0.5 + 0.125 ms.
    assert ROOFS.compute_ms(100_000_000, integer_share=0.5) == pytest.approx(0.625)


def test_floats_of_another_format_have_their_own_peak_where_it_is_higher() -> None:
    # 100 MFLOP at 200 GFLOP/s; half of it in integers: 0.25 + 0.125 ms.
    assert ROOFS.compute_ms(100_000_000, integer_share=0.0, precision="bfloat16") == pytest.approx(0.5)
    assert ROOFS.compute_ms(100_000_000, integer_share=0.5, precision="bfloat16") == pytest.approx(0.375)
    assert ROOFS.compute_ms(100_000_000, integer_share=0.0, precision="float16") == pytest.approx(1.0)
    demand = Demand(flops=50_000_000, weight_bytes=20_000, precision="bfloat16")
    assert place(demand, ROOFS, resident_bytes=500_000).compute_ms == pytest.approx(0.25)


COST: dict[str, Any] = {
    "kinds": {
        "convolution": {"flops": 8_000, "bytes": 900, "calls": 3},
        "linear": {"flops": 200, "bytes": 100, "calls": 1},
        "elementwise": {"flops": 50, "bytes": 400, "calls": 2},
    },
    "weight_bytes": 500,
    "num_parameters": 125,
    "flops": 8_250,
}


def test_weights_are_read_once_while_activations_grow_with_the_batch() -> None:
    # 500 of the 1000 bytes of convolution and linear are weights, half of each kind.
    found = demands(COST, batch_size=4, integer_share=0.0)
    assert found["convolution"] == Demand(flops=32_000, weight_bytes=450, activation_bytes=1_800, calls=3)
    assert found["linear"].num_bytes == 50 + 4 * 50
    assert found["elementwise"] == Demand(flops=200, weight_bytes=0, activation_bytes=1_600, calls=2)
    assert found["elementwise"].working_set_bytes == 800


def test_eight_bits_move_a_quarter_of_the_bytes_of_what_runs_in_integers() -> None:
    found = demands(COST, batch_size=1, integer_share=1.0)
    assert found["convolution"].num_bytes == 225
    assert found["elementwise"].num_bytes == 400


def test_sixteen_bits_move_half_of_the_bytes_of_everything() -> None:
    found = demands(COST, batch_size=1, integer_share=0.0, precision="bfloat16")
    assert found["convolution"].num_bytes == 450
    assert found["elementwise"].num_bytes == 200
    assert found["elementwise"].precision == "bfloat16"
    assert width(0.5, "float16") == 0.375
