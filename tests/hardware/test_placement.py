from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from hasten.hardware.placement import (
    Work,
    assignments,
    fastest_chain,
    heft,
    lowest_latency,
    makespan,
    most_throughput,
    period,
    timetable,
)

SECONDS = st.integers(1, 9).map(float)


@st.composite
def works(draw: st.DrawFn, chain: bool, devices: int = 2) -> Work:
    """Up to five parts; of a graph, each reads some of the earlier ones and all lead to the last."""
    parts = draw(st.integers(1, 5))
    reads = [((part - 1,) if part else ()) for part in range(parts)]
    if not chain:
        reads = [tuple(sorted(draw(st.sets(st.integers(0, part - 1))))) if part else () for part in range(parts)]
        unread = set(range(parts - 1)) - {source for sources in reads for source in sources}
        reads[-1] = tuple(sorted({*reads[-1], *unread}))
    able = st.lists(SECONDS | st.just(math.inf), min_size=devices, max_size=devices)
    seconds = draw(st.lists(able.filter(lambda row: min(row) < math.inf), min_size=parts, max_size=parts))
    moves = draw(st.lists(st.integers(0, 5), min_size=parts, max_size=parts))
    return Work(
        reads=tuple(reads),
        seconds=tuple(map(tuple, seconds)),
        transfers=tuple(
            tuple(tuple(0.0 if one == other else float(move) for other in range(devices)) for one in range(devices))
            for move in moves
        ),
    )


@given(works(chain=True, devices=3))
def test_the_fastest_chain_is_the_best_of_all_assignments(work: Work) -> None:
    assert makespan(work, fastest_chain(work)) == min(makespan(work, each) for each in assignments(work))


@given(works(chain=True, devices=3))
def test_most_throughput_is_the_best_of_all_that_give_a_device_consecutive_parts(work: Work) -> None:
    consecutive = [each for each in assignments(work) if num_changes(each) == len(set(each)) - 1]
    assume(consecutive)
    assert period(work, most_throughput(work)) == min(period(work, each) for each in consecutive)


@given(works(chain=False))
def test_heft_is_near_the_best_of_all_assignments(work: Work) -> None:
    """It is a heuristic: what is certain is that no assignment is better than the best, and that it gives a valid one.
    On such small graphs it stays within the bound of list scheduling, times the transfers that it could not foresee."""
    best = min(makespan(work, each) for each in assignments(work))
    found = makespan(work, heft(work))
    moves = sum(max(map(max, table)) for table in work.transfers)
    assert best <= found <= work.num_devices * best + moves


@given(works(chain=False))
def test_a_timetable_keeps_the_order_and_the_devices_apart(work: Work) -> None:
    way = heft(work)
    entries = {(it.request, it.part): it for it in timetable(work, way, requests=3, in_flight=2)}
    for (request, part), entry in entries.items():
        assert entry.end - entry.start == work.seconds[part][entry.device]
        for source in work.reads[part]:
            before = entries[request, source]
            assert entry.start >= before.end + work.transfers[source][before.device][entry.device]
    for device in range(work.num_devices):
        mine = sorted(it for it in entries.values() if it.device == device)
        assert all(one.end <= other.start for one, other in pairwise(mine))


def num_changes(assignment: tuple[int, ...]) -> int:
    return sum(one != other for one, other in pairwise(assignment))


def moved(seconds: float) -> tuple[tuple[float, ...], ...]:
    return (0.0, seconds), (seconds, 0.0)


CHAIN = Work(reads=((), (0,), (1,)), seconds=((3.0, 3.0), (1.0, 1.0), (4.0, 4.0)), transfers=(moved(0.5),) * 3)


def test_a_pipeline_of_two_devices_by_hand() -> None:
    """Parts 0 and 1 on the first device, 2 on the other: 4 s each, and 0.5 s between them."""
    way = most_throughput(CHAIN)
    assert way == (0, 0, 1)
    assert period(CHAIN, way) == 4.5
    assert [tuple(entry) for entry in timetable(CHAIN, way, requests=2, in_flight=2)] == [
        (0, 0, 0, 0.0, 3.0),
        (0, 1, 0, 3.0, 4.0),
        (0, 2, 1, 4.5, 8.5),
        (1, 0, 0, 4.0, 7.0),
        (1, 1, 0, 7.0, 8.0),
        (1, 2, 1, 8.5, 12.5),
    ]


def test_a_request_waits_where_no_more_may_be_under_way() -> None:
    starts = [entry.start for entry in timetable(CHAIN, (0, 0, 1), requests=2, in_flight=1) if entry.part == 0]
    assert starts == [0.0, 8.5]


def test_equal_devices_shorten_no_chain() -> None:
    assert lowest_latency(CHAIN) == (0, 0, 0)
    assert makespan(CHAIN, lowest_latency(CHAIN)) == 8.0


def test_parallel_branches_go_to_different_devices() -> None:
    """A diamond: 1 s, two branches of 5 s, 1 s, and 1 s to the other device. The branch there ends at 1 + 1 + 5; the
    other, at 6, has just arrived by then, and what joins them takes another second."""
    work = Work(
        reads=((), (0,), (0,), (1, 2)),
        seconds=((1.0, 1.0), (5.0, 5.0), (5.0, 5.0), (1.0, 1.0)),
        transfers=(moved(1.0),) * 4,
    )
    way = heft(work)
    assert way[1] != way[2]
    assert makespan(work, way) == 8.0 == min(makespan(work, each) for each in assignments(work))


def test_a_part_runs_only_where_it_can() -> None:
    work = Work(reads=((), (0,)), seconds=((1.0, math.inf), (math.inf, 1.0)), transfers=(moved(9.0),) * 2)
    assert fastest_chain(work) == heft(work) == most_throughput(work) == (0, 1)
