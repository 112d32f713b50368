"""By hand: 100 GFLOP/s (400 in integers), L1 of 32 kB at 100 GB/s, L2 of 1 MB at 50 GB/s, DRAM at 10 GB/s."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import MeasurementError
from hasten.core.interfaces import OperatorTime
from hasten.core.trial import BOTTLENECKS, Profile
from hasten.profiling.bottleneck import profile

ROOFLINE: dict[str, Any] = {
    "peak_gops": {"float32": 100.0, "int8": 400.0},
    "bandwidth_gbs": {"L1": 100.0, "L2": 50.0, "DRAM": 10.0},
    "capacity_bytes": {"L1": 32_000, "L2": 1_000_000},
}
CONVOLUTIONS = {"convolution": {"flops": 50_000_000, "bytes": 100_000, "calls": 2}}
LARGE_LINEAR = {"linear": {"flops": 2_000_000, "bytes": 4_000_000, "calls": 1}}
BOTH = {**CONVOLUTIONS, **LARGE_LINEAR}
ELEMENTWISE = {"elementwise": {"flops": 1_000, "bytes": 40_000, "calls": 2}}


def cost(kinds: dict[str, Any], weight_bytes: int) -> dict[str, Any]:
    return {"kinds": kinds, "weight_bytes": weight_bytes, "num_parameters": weight_bytes // 4, "flops": 0}


def times(**milliseconds: tuple[float, int]) -> list[OperatorTime]:
    """One operator time of a kind: its milliseconds and calls within a request."""
    return [
        OperatorTime(name=kind, kind=kind, milliseconds=time, calls=calls)
        for kind, (time, calls) in milliseconds.items()
    ]


def profiled(latency_ms: float, operators: list[OperatorTime], graph: dict[str, Any], **more: Any) -> Profile:
    chosen = {"call_us": 0.0, "operator_us": 0.0, "weight_bytes": graph["weight_bytes"], "size_bytes": 1_000, **more}
    return profile(latency_ms=latency_ms, operators=operators, cost=graph, roofline=ROOFLINE, **chosen)


def test_names_compute_where_arithmetic_takes_the_time() -> None:
    # 0.1 ms of 1 ms lie outside the operators; a call and four launches explain 0.04 of them. The elementwise operators
    # move 40 kB from L1, which takes 0.4 us; 1.6 us are four times that, the other 98.4 of 100 us are overhead.
    found = profiled(
        1.0,
        times(convolution=(0.8, 2), elementwise=(0.1, 2)),
        cost({**CONVOLUTIONS, **ELEMENTWISE}, 60_000),
        call_us=20.0,
        operator_us=5.0,
    )
    assert found.bottleneck == "compute"
    assert found.shares == pytest.approx({"compute": 0.8, "memory": 0.0016, "overhead": 0.1984, "capacity": 0.0})
    group = found.operators[0]
    assert (group.kind, group.calls, group.bound) == ("convolution", 2, "compute")
    assert (group.milliseconds, group.share, group.roof_ms) == pytest.approx((0.8, 0.8, 0.5))
    assert found.evidence[0] == (
        "80% of 1 ms is arithmetic: convolution takes 800 us for 50 MFLOP, where the peak of 100 GFLOP/s allows 500 us"
    )


def test_names_overhead_where_launching_takes_the_time() -> None:
    # A call and ten launches cost 20 + 10 * 6 = 80 us of 100; 50 of them lie outside, so 30 inside the operators.
    found = profiled(0.1, times(linear=(0.05, 10)), cost(LARGE_LINEAR, 10_000), call_us=20.0, operator_us=6.0)
    assert found.bottleneck == "overhead"
    assert found.shares["overhead"] == pytest.approx(0.8)
    assert found.evidence[0] == (
        "80% of 100 us is overhead: 50 us outside the operators, 30 us of launching 10 operators"
    )


def test_names_overhead_where_the_engine_wastes_what_the_machine_could_do() -> None:
    # 50 MFLOP take 0.5 ms at best. 2 ms are a quarter of the roofline; the other 4 of 6 are the engine's.
    found = profiled(6.0, times(convolution=(6.0, 2)), cost(CONVOLUTIONS, 60_000))
    assert found.bottleneck == "overhead"
    assert found.shares["overhead"] == pytest.approx(4 / 6)
    assert found.evidence[0].endswith("4 ms inside them beyond 4 times what the roofline allows")


def test_time_outside_the_operators_counts_once() -> None:
    # The launches are 0.05 ms of the 0.2 ms that lie outside already.
    found = profiled(1.0, times(convolution=(0.8, 10)), cost(CONVOLUTIONS, 0), operator_us=5.0)
    assert found.shares["overhead"] == pytest.approx(0.2)


def test_names_memory_where_weights_stream_from_dram() -> None:
    # 4 MB at 10 GB/s take 0.4 ms, their 2 MFLOP 0.02 ms.
    found = profiled(0.5, times(linear=(0.45, 1)), cost(LARGE_LINEAR, 4_000_000))
    assert found.bottleneck == "memory"
    assert found.shares["memory"] == pytest.approx(0.9)
    assert found.operators[0].roof_ms == pytest.approx(0.4)
    assert "45" in found.evidence[0]
    assert "no cache holds the 4 MB of weights, which are read at 10 GB/s" in found.evidence


def test_a_larger_batch_turns_the_same_layer_into_arithmetic() -> None:
    # 32 rows: 64 MFLOP take 0.64 ms, the weights still 0.4 ms.
    found = profiled(0.8, times(linear=(0.7, 1)), cost(LARGE_LINEAR, 4_000_000), batch_size=32)
    assert found.bottleneck == "compute"
    assert found.operators[0].flops == 64_000_000
    assert found.operators[0].roof_ms == pytest.approx(0.64)


def test_integers_are_held_against_their_own_roof() -> None:
    found = profiled(0.3, times(convolution=(0.25, 2)), cost(CONVOLUTIONS, 60_000), integer_share=1.0)
    assert found.operators[0].roof_ms == pytest.approx(0.125)
    assert found.operators[0].num_bytes == 25_000


def test_names_capacity_where_a_size_limit_is_broken() -> None:
    graph = cost(CONVOLUTIONS, 60_000)
    found = profiled(1.0, times(convolution=(0.9, 2)), graph, size_bytes=4_000_000, size_limit_bytes=3_000_000)
    assert found.bottleneck == "capacity"
    assert found.shares["capacity"] == pytest.approx(0.25)
    assert found.evidence[0] == "the files take 4 MB, 33% above the limit of 3 MB"


def test_a_size_limit_that_holds_is_no_bottleneck() -> None:
    graph = cost(CONVOLUTIONS, 60_000)
    found = profiled(1.0, times(convolution=(0.9, 2)), graph, size_bytes=3_000_000, size_limit_bytes=3_000_000)
    assert (found.bottleneck, found.shares["capacity"]) == ("compute", 0.0)


def test_times_that_the_profiler_inflates_are_scaled_to_the_latency() -> None:
    # 3 ms of operators within 2 ms of which an empty call takes 0.2: scaled by 1.8 / 3.
    found = profiled(2.0, times(convolution=(2.0, 2), linear=(1.0, 2)), cost(BOTH, 4_000_000), call_us=200.0)
    assert [group.milliseconds for group in found.operators] == pytest.approx([1.2, 0.6])
    assert found.shares == pytest.approx({"compute": 0.6, "memory": 0.3, "overhead": 0.1, "capacity": 0.0})
    assert any("scaled by 0.60" in sentence for sentence in found.evidence)


def test_operators_that_the_model_does_not_ask_for_are_overhead() -> None:
    found = profiled(1.0, times(copy=(0.7, 4), convolution=(0.3, 2)), cost(CONVOLUTIONS, 0))
    assert found.bottleneck == "overhead"
    assert found.shares["overhead"] == pytest.approx(0.7)


def test_operators_of_one_kind_are_one_group() -> None:
    found = profiled(1.0, [*times(convolution=(0.2, 1)), *times(convolution=(0.3, 2))], cost(CONVOLUTIONS, 0))
    assert [(group.calls, group.milliseconds) for group in found.operators] == [(3, pytest.approx(0.5))]


@pytest.mark.parametrize("latency_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_latency_that_is_none(latency_ms: float) -> None:
    with pytest.raises(MeasurementError, match="latency"):
        profiled(latency_ms, times(convolution=(0.2, 1)), cost(CONVOLUTIONS, 0))


def test_refuses_a_profile_without_operators() -> None:
    with pytest.raises(MeasurementError, match="no operators"):
        profiled(1.0, [], cost(CONVOLUTIONS, 0))


KINDS = st.sampled_from(["convolution", "linear", "elementwise", "copy", "other"])
DEMANDS = st.fixed_dictionaries(
    {"flops": st.integers(0, 10**10), "bytes": st.integers(0, 10**9), "calls": st.integers(1, 200)}
)
OPERATORS = st.lists(
    st.builds(
        OperatorTime, name=st.just("x"), kind=KINDS, milliseconds=st.floats(1e-6, 1e3), calls=st.floats(0.0, 100.0)
    ),
    min_size=1,
    max_size=12,
)


@given(
    latency_ms=st.floats(1e-4, 1e4),
    operators=OPERATORS,
    kinds=st.dictionaries(KINDS, DEMANDS),
    call_us=st.floats(0, 1e4),
    operator_us=st.floats(0, 1e3),
    weight_bytes=st.integers(0, 10**9),
    batch_size=st.integers(1, 64),
    integer_share=st.floats(0, 1),
    size_limit_bytes=st.none() | st.integers(1, 10**6),
)
def test_shares_are_shares_and_operators_fit_the_latency(
    latency_ms: float, operators: list[OperatorTime], kinds: dict[str, Any], weight_bytes: int, **more: Any
) -> None:
    found = profiled(latency_ms, operators, cost(kinds, weight_bytes), **more)
    assert set(found.shares) == {"compute", "memory", "overhead", "capacity"} <= set(BOTTLENECKS)
    assert all(0 <= share <= 1 for share in found.shares.values())
    assert sum(found.shares[name] for name in ("compute", "memory", "overhead")) == pytest.approx(1)
    assert sum(group.milliseconds for group in found.operators) <= latency_ms * (1 + 1e-9)
    assert all(group.milliseconds >= 0 and 0 <= group.share <= 1 and group.roof_ms >= 0 for group in found.operators)
    largest = max(("compute", "memory", "overhead"), key=lambda name: found.shares[name])
    assert found.bottleneck == ("capacity" if found.shares["capacity"] > 0 else largest)


@given(operators=OPERATORS, less=st.floats(0, 100), more=st.floats(0, 100))
def test_dearer_launches_never_lower_the_overhead(operators: list[OperatorTime], less: float, more: float) -> None:
    shares = [
        profiled(10.0, operators, cost(CONVOLUTIONS, 0), operator_us=each).shares["overhead"]
        for each in (less, less + more)
    ]
    assert shares[0] <= shares[1] + 1e-12
