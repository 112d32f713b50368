"""By hand: 100 GFLOP/s (200 in bfloat16), L1 of 32 kB at 100 GB/s, L2 of 1 MB at 50 GB/s, DRAM at 10 GB/s."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import MeasurementError
from hasten.core.interfaces import StepFigures, StepOperators, StepWork
from hasten.core.trial import BOTTLENECKS, PHASES, Collective, StepProfile
from hasten.profiling.step import profile_step

ROOFLINE: dict[str, Any] = {
    "peak_gops": {"float32": 100.0, "bfloat16": 200.0},
    "bandwidth_gbs": {"L1": 100.0, "L2": 50.0, "DRAM": 10.0},
    "capacity_bytes": {"L1": 32_000, "L2": 1_000_000},
}
NO_TIME = dict.fromkeys(PHASES, 0.0)


def operators(phase: str, kind: str, milliseconds: float, calls: float, idle_ms: float = 0.0) -> StepOperators:
    return StepOperators(phase=phase, kind=kind, milliseconds=milliseconds, calls=calls, idle_ms=idle_ms)


def work(phase: str, kind: str, calls: int, flops: int, num_bytes: int, precision: str = "float32") -> StepWork:
    return StepWork(phase=phase, kind=kind, calls=calls, flops=flops, num_bytes=num_bytes, precision=precision)


CONVOLUTIONS = work("forward", "convolution", 2, 100_000_000, 50_000)
"""1 ms of arithmetic at best, and 0.5 us of memory traffic in L1."""
ADDITIONS = work("forward", "elementwise", 1, 1_000_000, 20_000_000)
"""2 ms of memory traffic at best, for no cache holds 20 MB, and 10 us of arithmetic."""


def figures(
    *found: StepOperators, works: tuple[StepWork, ...] = (), watched: dict[str, float] | None = None, **more: Any
) -> StepFigures:
    times = dict.fromkeys(("forward", "backward", "optimizer"), 0.0) | (watched or {})
    chosen = {"page_fault_us": 0.0, "activation_bytes": 0, **more}
    return StepFigures(operators=found, work=works, watched_ms=times, **chosen)


def profiled(phases: dict[str, float], given: StepFigures, faults: int = 0, **more: Any) -> StepProfile:
    return profile_step(
        phases_ms=np.array([[{**NO_TIME, **phases}[name] for name in PHASES]]),
        page_faults=np.array([faults]),
        figures=given,
        roofline=ROOFLINE,
        **more,
    )


def test_names_data_where_a_step_waits_for_its_batch() -> None:
    found = profiled(
        {"data": 8.2, "forward": 5.0, "other": 0.2},
        figures(operators("forward", "convolution", 5.0, 2), works=(CONVOLUTIONS,)),
    )
    assert found.bottleneck == "data"
    assert found.shares == pytest.approx(
        {"data": 8.2 / 13.4, "transfer": 0.0, "compute": 5 / 13.4, "memory": 0.0, "overhead": 0.2 / 13.4}
    )
    assert found.evidence[0] == "61% of a step waits for the next batch (8.2 ms of 13.4 ms)"


def test_processors_that_the_loader_takes_are_waited_for_too() -> None:
    # Of 8 ms in which it calculates the step was ready for 6 and had no processor: a quarter of each is left.
    given = figures(operators("forward", "convolution", 6.0, 2), works=(CONVOLUTIONS,), watched={"forward": 8.0})
    found = profiled({"data": 2.0, "forward": 8.0}, given, delays_ms=np.array([6.0]))
    assert found.bottleneck == "data"
    assert found.shares["data"] == pytest.approx(0.8)
    assert found.shares["compute"] == pytest.approx(0.15)
    assert found.shares["overhead"] == pytest.approx(0.05)
    assert found.evidence[0] == (
        "80% of a step waits for the next batch (8 ms of 10 ms): 6 ms of it for a processor, while others load batches"
    )


def test_names_transfer_where_moving_the_batch_takes_the_time() -> None:
    found = profiled({"transfer": 3.0, "forward": 1.0}, figures(operators("forward", "convolution", 1.0, 2)))
    assert found.bottleneck == "transfer"
    assert found.evidence[0] == "75% of a step moves the batch to the device (3 ms of 4 ms)"


def test_names_communication_where_a_step_waits_for_other_processes() -> None:
    # 10 ms of the backward pass go by in waiting; of the other 6 ms the convolutions take what they took before.
    reduced = Collective(kind="all_reduce", calls=2, num_bytes=4_500_000, milliseconds=12.5, waited_ms=10.0)
    given = figures(
        operators("backward", "convolution", 5.0, 2),
        works=(replace(CONVOLUTIONS, phase="backward"),),
        watched={"backward": 16.5},
        collectives=(reduced,),
        waiting_ms={"backward": 10.0},
    )
    found = profiled({"backward": 16.0, "other": 4.0}, given)
    assert found.bottleneck == "communication"
    assert found.shares == pytest.approx(
        {"data": 0.0, "transfer": 0.0, "compute": 0.25, "memory": 0.0, "overhead": 0.25, "communication": 0.5}, abs=1e-3
    )
    assert found.evidence[0] == (
        "50% of a step waits for other processes (10 ms of 20 ms): all_reduce moves 4.5 MB a step in 12.5 ms, 20% of "
        "it beside calculation"
    )
    assert found.phases_ms["backward"] == 16.0
    assert found.parts_ms["backward"] == pytest.approx(6.0)
    assert found.parts_ms["communication"] == pytest.approx(10.0)
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms)


def test_no_phase_waits_longer_than_it_takes() -> None:
    reduced = Collective(kind="all_reduce", calls=1, num_bytes=4, milliseconds=9.0, waited_ms=9.0)
    given = figures(operators("forward", "convolution", 5.0, 2), collectives=(reduced,), waiting_ms={"backward": 9.0})
    found = profiled({"forward": 5.0, "backward": 5.0}, given)
    assert found.shares["communication"] == pytest.approx(0.5)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_names_compute_where_arithmetic_takes_the_time() -> None:
    # 6 ms of convolutions, of which launching them takes 0.1; 0.4 of 6.3 ms are neither.
    found = profiled(
        {"forward": 6.3},
        figures(
            operators("forward", "convolution", 6.0, 2, idle_ms=0.1), works=(CONVOLUTIONS,), watched={"forward": 7}
        ),
    )
    assert found.bottleneck == "compute"
    assert found.shares["compute"] == pytest.approx(5.9 / 6.3)
    assert found.shares["overhead"] == pytest.approx(0.4 / 6.3)
    (group,) = found.operators
    assert (group.kind, group.bound, group.calls, group.flops) == ("convolution forward", "compute", 2, 100_000_000)
    # Under the profiler 0.1 ms of launching and 1 ms of Python were overhead: a share of 1/11 of the 0.4 ms.
    assert group.milliseconds == pytest.approx(5.9 + 0.4 / 11)
    assert group.roof_ms == pytest.approx(1.0)
    assert found.evidence[0] == (
        "94% of a step is arithmetic (5.9 ms of 6.3 ms): convolution in the forward pass takes 5.94 ms for 100 MFLOP, "
        "where the roofline allows 1 ms"
    )


def test_half_the_width_is_half_the_arithmetic_at_best() -> None:
    narrow = work("forward", "convolution", 2, 100_000_000, 50_000, "bfloat16")
    found = profiled({"forward": 1.0}, figures(operators("forward", "convolution", 1.0, 2), works=(narrow,)))
    assert found.operators[0].roof_ms == pytest.approx(0.5)


def test_names_memory_where_bytes_take_the_time() -> None:
    found = profiled(
        {"forward": 4.0},
        figures(operators("forward", "elementwise", 4.0, 1), works=(ADDITIONS,), activation_bytes=20_000_000),
    )
    assert found.bottleneck == "memory"
    assert found.shares["memory"] == pytest.approx(1.0)
    assert found.evidence == (
        "100% of a step is memory traffic (4 ms of 4 ms): elementwise in the forward pass takes 4 ms to move 20 MB, "
        "where the bandwidth allows 2 ms, 20 MB of activations are kept for the backward pass",
    )


def test_waiting_for_fresh_memory_is_memory_whoever_waits() -> None:
    # 1000 faults of 2 us: 2 of the 5 ms of arithmetic.
    found = profiled(
        {"forward": 5.0},
        figures(operators("forward", "convolution", 5.0, 2), works=(CONVOLUTIONS,), page_fault_us=2.0),
        faults=1000,
    )
    assert found.shares["memory"] == pytest.approx(0.4)
    assert found.shares["compute"] == pytest.approx(0.6)
    assert "1000 pages of fresh memory take 2 ms" in found.evidence[1]


def test_a_kind_with_operators_under_either_roof_is_divided_as_the_roofs_say() -> None:
    # 1 ms of arithmetic at best, and 2 ms of traffic.
    traffic = work("forward", "convolution", 1, 1_000, 20_000_000)
    found = profiled(
        {"forward": 6.0}, figures(operators("forward", "convolution", 6.0, 3), works=(CONVOLUTIONS, traffic))
    )
    assert found.shares["compute"] == pytest.approx(1 / 3)
    assert found.shares["memory"] == pytest.approx(2 / 3)


def test_names_overhead_where_many_operators_have_nothing_to_do() -> None:
    # 400 calls take 3 ms under the profiler, 2.8 of them also with nothing to do; 1.2 ms lie between them, all slowed.
    # The roofline allows 32 ns for all their bytes: four times that is work, the other 0.2 ms are not.
    tiny = work("forward", "elementwise", 400, 400, 3_200)
    found = profiled(
        {"forward": 2.1, "other": 0.3},
        figures(operators("forward", "elementwise", 3.0, 400, idle_ms=2.8), works=(tiny,), watched={"forward": 4.2}),
    )
    assert found.bottleneck == "overhead"
    assert found.shares["overhead"] == pytest.approx(1.0, abs=1e-3)
    # Of the 2.1 ms of the forward pass 3 / (3 + 1.2) are launching.
    assert found.evidence[0] == (
        "100% of a step is overhead (2.4 ms of 2.4 ms): 400 operator calls of 3.75 us each beside their work, "
        "600 us of Python between them, 300 us between the phases"
    )


def test_the_less_work_beside_the_launch_the_more_of_the_excess_is_overhead() -> None:
    # 1 ms of arithmetic at best. Launching takes 2 ms, so that half of the 8 ms beyond are work.
    given = figures(operators("forward", "convolution", 10.0, 2, idle_ms=2.0), works=(CONVOLUTIONS,))
    assert profiled({"forward": 10.0}, given).shares["compute"] == pytest.approx(0.4)


def test_names_overhead_where_python_runs_between_the_operators() -> None:
    found = profiled(
        {"forward": 10.0},
        figures(operators("forward", "convolution", 1.0, 2), works=(CONVOLUTIONS,), watched={"forward": 12.0}),
    )
    assert found.shares["overhead"] == pytest.approx(0.9)
    assert "9 ms of Python between them" in found.evidence[0]


def test_a_profiler_takes_nothing_from_overhead_so_slower_work_is_the_rest() -> None:
    # Under the profiler 1 ms was lost beside 4 ms of work. A phase of 11 ms on the clock has lost no more than that.
    found = profiled(
        {"forward": 11.0},
        figures(operators("forward", "elementwise", 4.0, 1), works=(ADDITIONS,), watched={"forward": 5.0}),
    )
    assert found.shares["overhead"] == pytest.approx(1 / 11)
    assert found.operators[0].milliseconds == pytest.approx(10.0)


def test_operators_take_no_longer_than_their_phase() -> None:
    found = profiled(
        {"forward": 2.0, "backward": 2.0},
        figures(
            operators("forward", "convolution", 8.0, 2),
            operators("backward", "linear", 1.0, 1),
            watched={"forward": 9.0, "backward": 3.0},
            works=(CONVOLUTIONS, work("backward", "linear", 1, 1_000_000, 1_000)),
        ),
    )
    times = {group.kind: group.milliseconds for group in found.operators}
    assert times == pytest.approx({"convolution forward": 2.0, "linear backward": 1.0})
    assert found.shares["overhead"] == pytest.approx(0.25)


def test_a_compilers_own_kernels_do_what_no_operators_were_seen_for() -> None:
    found = profiled(
        {"forward": 6.0},
        figures(
            operators("forward", "convolution", 2.0, 2),
            operators("forward", "fused", 4.0, 1),
            works=(CONVOLUTIONS, ADDITIONS, work("backward", "elementwise", 1, 1, 10**9)),
        ),
    )
    fused, _ = found.operators
    assert (fused.kind, fused.num_bytes, fused.bound) == ("fused forward", 20_000_000, "memory")
    assert found.shares["memory"] == pytest.approx(4 / 6)


def test_the_update_is_one_group() -> None:
    update = work("optimizer", "optimizer", 1, 1_000, 20_000_000)
    found = profiled({"optimizer": 3.0}, figures(operators("optimizer", "optimizer", 3.0, 1), works=(update,)))
    assert [group.kind for group in found.operators] == ["optimizer"]
    assert found.bottleneck == "memory"


def test_names_capacity_where_the_limit_is_broken() -> None:
    given = figures(operators("forward", "convolution", 5.0, 2), works=(CONVOLUTIONS,), activation_bytes=900_000_000)
    found = profiled({"forward": 5.0}, given, memory_bytes=3_000_000_000, memory_limit_bytes=2_000_000_000)
    assert found.bottleneck == "capacity"
    assert found.shares["capacity"] == pytest.approx(1 / 3)
    assert found.evidence[0] == (
        "the training takes 3 GB, 50% above the limit of 2 GB; 900 MB are activations kept for the backward pass"
    )
    kept = profiled({"forward": 5.0}, given, memory_bytes=1_000_000_000, memory_limit_bytes=2_000_000_000)
    assert (kept.bottleneck, "capacity" in kept.shares) == ("compute", False)


def test_steps_are_averaged() -> None:
    found = profile_step(
        phases_ms=np.array([[1.0, 0, 2, 0, 0, 0], [3.0, 0, 4, 0, 0, 0]]),
        page_faults=np.array([0, 0]),
        figures=figures(operators("forward", "convolution", 3.0, 2), works=(CONVOLUTIONS,)),
        roofline=ROOFLINE,
    )
    assert found.step_ms == pytest.approx(5.0)
    assert found.phases_ms == pytest.approx({**NO_TIME, "data": 2.0, "forward": 3.0})


def test_refuses_to_profile_nothing() -> None:
    with pytest.raises(MeasurementError, match="at least one"):
        profile_step(phases_ms=np.zeros((0, 6)), page_faults=np.zeros(0, int), figures=figures(), roofline=ROOFLINE)
    with pytest.raises(MeasurementError, match="no operators"):
        profiled({"forward": 1.0}, figures())


def test_figures_go_through_json() -> None:
    given = figures(operators("forward", "convolution", 5.0, 2), works=(CONVOLUTIONS,), watched={"forward": 7.0})
    assert StepFigures.from_dict(json.loads(json.dumps(given.to_dict()))) == given


PHASE = st.sampled_from(["forward", "backward", "optimizer"])
KIND = st.sampled_from(["convolution", "elementwise", "fused", "other"])
MILLISECONDS = st.floats(0, 1e3)


@given(
    phases=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6),
    faults=st.integers(0, 10**6),
    times=st.dictionaries(st.tuples(PHASE, KIND), st.tuples(MILLISECONDS, st.floats(0, 500), MILLISECONDS), min_size=1),
    works=st.lists(
        st.builds(
            StepWork,
            phase=PHASE,
            kind=KIND,
            calls=st.integers(1, 100),
            flops=st.integers(0, 10**10),
            num_bytes=st.integers(0, 10**9),
        )
    ),
    watched=st.fixed_dictionaries(dict.fromkeys(("forward", "backward", "optimizer"), MILLISECONDS)),
    page_fault_us=st.floats(0, 10),
    delay_ms=st.floats(0, 1e4),
)
def test_shares_are_shares_of_the_step(
    phases: list[float],
    faults: int,
    times: dict[tuple[str, str], tuple[float, float, float]],
    works: list[StepWork],
    watched: dict[str, float],
    page_fault_us: float,
    delay_ms: float,
) -> None:
    found = profiled(
        dict(zip(PHASES, phases, strict=True)),
        figures(
            *(operators(phase, kind, *numbers) for (phase, kind), numbers in times.items()),
            works=tuple(works),
            watched=watched,
            page_fault_us=page_fault_us,
        ),
        faults,
        delays_ms=np.array([delay_ms]),
    )
    assert set(found.shares) == {"data", "transfer", "compute", "memory", "overhead"} <= set(BOTTLENECKS)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in found.shares.values())
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.step_ms == pytest.approx(sum(phases))
    assert sum(group.share for group in found.operators) <= 1 + 1e-9
    assert found.shares[found.bottleneck] == max(found.shares.values())
