"""Which device does which part of a model: schedules for the lowest latency of a request and for the most throughput.

Parts are numbered in an order in which they can be run, devices as they come. Nothing here measures or runs anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Assignment = tuple[int, ...]
"""Number of the device of each part."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be placed.

    Attributes:
        reads: of each part, the earlier ones whose result it takes.
        seconds: [part][device] of one request; infinite where the device can't run the part.
        transfers: [part][from][to] seconds until the result of the part is at hand on another device; 0 on the same.
    """

    reads: tuple[tuple[int, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    transfers: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def num_parts(self) -> int:
        return len(self.reads)

    @property
    def num_devices(self) -> int:
        return len(self.seconds[0])

    @property
    def is_chain(self) -> bool:
        """Whether each part reads just the one before it."""
        return all(reads == ((part - 1,) if part else ()) for part, reads in enumerate(self.reads))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(other for other, reads in enumerate(self.reads) if part in reads) for part in range(self.num_parts)
        )


class Entry(NamedTuple):
    """One bar of a Gantt chart, in seconds from the start of the first."""

    request: int
    part: int
    device: int
    start: float
    end: float


def timetable(work: Work, assignment: Assignment, requests: int = 1, in_flight: int = 1) -> list[Entry]:
    """When each part is run if every device takes what is there in the order of the requests.

    Args:
        requests: how many are to be answered.
        in_flight: a request is begun when the one so many before it is finished.
    """
    free = [0.0] * work.num_devices
    entries: dict[tuple[int, int], Entry] = {}
    for request in range(requests):
        admitted = entries[request - in_flight, work.num_parts - 1].end if request >= in_flight else 0.0
        for part, device in enumerate(assignment):
            ready = [
                entries[request, source].end + work.transfers[source][assignment[source]][device]
                for source in work.reads[part]
            ]
            start = max([admitted, free[device], *ready])
            free[device] = start + work.seconds[part][device]
            entries[request, part] = Entry(request, part, device, start, free[device])
    return list(entries.values())


def makespan(work: Work, assignment: Assignment) -> float:
    """Seconds of one request."""
    return max(entry.end for entry in timetable(work, assignment))


def period(work: Work, assignment: Assignment) -> float:
    """Seconds from one finished request to the next in a full pipeline: those that the busiest device is busy.

    What comes from another device is charged to the one that waits for it.
    """
    busy = [0.0] * work.num_devices
    for part, device in enumerate(assignment):
        arriving = (work.transfers[source][assignment[source]][device] for source in work.reads[part])
        busy[device] += work.seconds[part][device] + sum(arriving)
    return max(busy)


def lowest_latency(work: Work) -> Assignment:
    """By dynamic programming where the parts are a chain, which is exact; by HEFT elsewhere, which is not."""
    return fastest_chain(work) if work.is_chain else heft(work)


def fastest_chain(work: Work) -> Assignment:
    """The assignment of a chain with the least sum of work and transfers: a shortest path over (part, device)."""
    best: list[tuple[float, Assignment]] = [(seconds, (device,)) for device, seconds in enumerate(work.seconds[0])]
    for part in range(1, work.num_parts):
        best = [
            min((before + work.transfers[part - 1][way[-1]][device] + seconds, (*way, device)) for before, way in best)
            for device, seconds in enumerate(work.seconds[part])
        ]
    return min(best)[1]


def heft(work: Work) -> Assignment:
    """Heterogeneous Earliest Finish Time (Topcuoglu, Hariri and Wu, IEEE TPDS 13(3), 2002).

    Parts in descending order of their upward rank, the mean length of the longest way to the end, each on the device
    that finishes it first, in a gap between what is already there if it fits.
    """
    ranks = _upward_ranks(work)
    slots: list[list[Entry]] = [[] for _ in range(work.num_devices)]
    placed: dict[int, Entry] = {}
    for part in sorted(range(work.num_parts), key=lambda each: (-ranks[each], each)):
        options = []
        for device, seconds in enumerate(work.seconds[part]):
            if math.isfinite(seconds):
                ready = max(
                    (
                        placed[source].end + work.transfers[source][placed[source].device][device]
                        for source in work.reads[part]
                    ),
                    default=0.0,
                )
                start = _gap(slots[device], ready, seconds)
                options.append((start + seconds, device, start))
        end, device, start = min(options)
        placed[part] = Entry(0, part, device, start, end)
        slots[device] = sorted([*slots[device], placed[part]], key=lambda entry: entry.start)
    return tuple(placed[part].device for part in range(work.num_parts))


def _upward_ranks(work: Work) -> list[float]:
    ranks = [0.0] * work.num_parts
    pairs = list(itertools.permutations(range(work.num_devices), 2))
    for part in reversed(range(work.num_parts)):
        possible = [seconds for seconds in work.seconds[part] if math.isfinite(seconds)]
        moved = sum(work.transfers[part][one][other] for one, other in pairs) / len(pairs) if pairs else 0.0
        after = max((moved + ranks[reader] for reader in work.readers[part]), default=0.0)
        ranks[part] = sum(possible) / len(possible) + after
    return ranks


def _gap(taken: Sequence[Entry], ready: float, seconds: float) -> float:
    """The first moment from `ready` on at which the device has nothing to do for so long."""
    start = ready
    for entry in taken:
        if start + seconds <= entry.start:
            break
        start = max(start, entry.end)
    return start


def most_throughput(work: Work) -> Assignment:
    """Consecutive parts on a device each, so that the busiest device is busy for the shortest time; exact for a chain.

    Dynamic programming over (parts placed, devices used, last device). A result that skips a stage is charged as if it
    came from the stage before.
    """
    best: dict[tuple[int, frozenset[int], int], tuple[float, Assignment]] = {(0, frozenset(), -1): (0.0, ())}
    for begin in range(work.num_parts):
        for (placed, used, last), (worst, way) in list(best.items()):
            if placed != begin:
                continue
            for device in set(range(work.num_devices)) - used:
                for end in range(begin + 1, work.num_parts + 1):
                    busy = max(worst, _stage_seconds(work, begin, end, device, last))
                    state, stage = (end, used | {device}, device), (*way, *(device for _ in range(begin, end)))
                    if math.isfinite(busy) and (state not in best or (busy, stage) < best[state]):
                        best[state] = (busy, stage)
    finished = [option for (placed, _, _), option in best.items() if placed == work.num_parts]
    return min(finished)[1]


def _stage_seconds(work: Work, begin: int, end: int, device: int, before: int) -> float:
    arriving = (
        work.transfers[source][before][device]
        for part in range(begin, end)
        for source in work.reads[part]
        if source < begin
    )
    return sum(work.seconds[part][device] for part in range(begin, end)) + sum(arriving)


def assignments(work: Work) -> Iterator[Assignment]:
    """Every one that there is, which is for small cases."""
    able = [[device for device, it in enumerate(seconds) if math.isfinite(it)] for seconds in work.seconds]
    return itertools.product(*able)
