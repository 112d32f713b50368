"""What the processes of a training tell one another in a step, and how long each waits for it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from torch.profiler import profile

from hasten.core.trial import PHASES, Collective
from hasten.training.step_kinds import kind_of

_BACKENDS = ("gloo:", "nccl:")
_WAITING = ("c10d::", "_c10d_functional::")
"""Operators that begin a collective or wait for one; what lies in them is no calculation."""
_SIZES = {
    "double": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "short": 2,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
}
"""Bytes of a number, by the names that PyTorch's profiler has for their types."""


class Span(NamedTuple):
    """Of time, in microseconds."""

    start: float
    end: float


class _Flight(NamedTuple):
    """A collective on its way, less what its thread calculates besides."""

    kind: str
    num_bytes: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Of one traced step.

    Attributes:
        collectives: by kind.
        waiting_ms: phase -> milliseconds of it in which the thread that trains waits for them.
    """

    collectives: Mapping[str, Collective]
    waiting_ms: Mapping[str, float]

    @classmethod
    def of(cls, profiler: profile) -> Communication:
        """What a profiler saw, with the shapes of tensors.

        A thread of the backend carries out a collective while the one that trains goes on until it needs the result.
        That it waits for it is not seen in a trace but by its doing nothing: it waits from the end of the operator
        before to the end of a collective, as far as one is on its way, where no operator begins in between. The
        backend's thread wakes it first and writes down its own end later, whenever it gets a processor: an end counts
        as long after the gap as that was.
        """
        events = [event for event in profiler.events() or () if not event.is_async]  # type: ignore[no-untyped-call]
        phases = [event for event in events if event.name in PHASES]
        if not phases:
            return cls(collectives={}, waiting_ms={})
        thread, begin = phases[0].thread, min(event.time_range.start for event in phases)
        own = [event for event in events if event.thread == thread]
        whole = Span(begin, max(event.time_range.end for event in own))
        calculated = union(_span(event) for event in own if kind_of(event.name) is not None)
        calculated = less(calculated, union(_span(event) for event in own if event.name.startswith(_WAITING)))
        elsewhere: dict[int, list[Span]] = defaultdict(list)
        for event in events:
            if event.thread != thread and kind_of(event.name) is not None:
                elsewhere[event.thread].append(_span(event))
        flights = _flights(profiler, begin, elsewhere)
        waited = _waited(less([whole], calculated), flights)
        return cls(
            collectives=_by_kind(flights, waited),
            waiting_ms={name: length(both(waited, spans)) / 1e3 for name, spans in _ranges(phases, whole).items()},
        )


def mean_of(steps: Sequence[Communication]) -> tuple[tuple[Collective, ...], dict[str, float]]:
    """Of steps that need not all communicate: collectives, the longest first, and what each phase waits."""
    if not steps:
        return (), {}
    found = []
    for kind in sorted({kind for step in steps for kind in step.collectives}):
        seen = [step.collectives[kind] for step in steps if kind in step.collectives]
        found.append(
            Collective(
                kind=kind,
                calls=sum(each.calls for each in seen) / len(steps),
                num_bytes=round(sum(each.num_bytes for each in seen) / len(steps)),
                milliseconds=sum(each.milliseconds for each in seen) / len(steps),
                waited_ms=sum(each.waited_ms for each in seen) / len(steps),
            )
        )
    waiting_ms = {name: sum(step.waiting_ms.get(name, 0.0) for step in steps) / len(steps) for name in PHASES}
    return tuple(sorted(found, key=lambda each: -each.milliseconds)), waiting_ms


def _flights(profiler: profile, begin: float, elsewhere: Mapping[int, Sequence[Span]]) -> list[_Flight]:
    """Collectives that began in the step, without what is calculated in their threads when they have arrived."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    found = []
    for event in results.events():
        name: str = event.name()
        start = (event.start_ns() - results.trace_start_ns()) / 1e3
        if not name.startswith(_BACKENDS) or start < begin:
            continue
        span = Span(start, start + event.duration_ns() / 1e3)
        spans = less([span], union(elsewhere.get(event.start_thread_id(), ())))
        found.append(_Flight(name.partition(":")[2], _num_bytes(event.shapes(), event.dtypes()), tuple(spans)))
    return found


def _num_bytes(shapes: Iterable[Sequence[int]], types: Iterable[str]) -> int:
    return sum(math.prod(shape) * _SIZES.get(kind, 0) for shape, kind in zip(shapes, types, strict=False))


def _waited(gaps: Iterable[Span], flights: Sequence[_Flight]) -> list[Span]:
    """Parts of the gaps in which a collective was waited for."""
    under_way = union(span for flight in flights for span in flight.spans)
    ends = [max(span.end for span in flight.spans) for flight in flights if flight.spans]
    waits = []
    for gap in gaps:
        within = [end for end in ends if gap.start < end <= gap.end + length([gap])]
        if within:
            waits.append(Span(gap.start, min(gap.end, max(within))))
    return both(waits, under_way)


def _by_kind(flights: Sequence[_Flight], waited: Sequence[Span]) -> dict[str, Collective]:
    """What several kinds take at the same time each takes, but it is waited for one of them."""
    found, left = {}, list(waited)
    for kind in sorted({flight.kind for flight in flights}):
        mine = [flight for flight in flights if flight.kind == kind]
        spans = union(span for flight in mine for span in flight.spans)
        found[kind] = Collective(
            kind=kind,
            calls=len(mine),
            num_bytes=sum(flight.num_bytes for flight in mine),
            milliseconds=length(spans) / 1e3,
            waited_ms=length(both(left, spans)) / 1e3,
        )
        left = less(left, spans)
    return found


def _ranges(phases: Sequence[Any], whole: Span) -> dict[str, list[Span]]:
    """Where each phase is; what lies in none is `other`."""
    found = {name: union(_span(event) for event in phases if event.name == name) for name in PHASES}
    found["other"] = less([whole], union(span for name, spans in found.items() if name != "other" for span in spans))
    return found


def _span(event: Any) -> Span:
    return Span(event.time_range.start, event.time_range.end)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that neither overlap nor touch, in their order."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


def less(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """What is left of spans without others; both as of `union`."""
    edges = [-math.inf, *(edge for span in taken for edge in span), math.inf]
    return both(spans, [Span(start, end) for start, end in list(pairwise(edges))[::2]])


def both(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """What lies in two lists of spans, both as of `union`."""
    found, first, second = [], 0, 0
    while first < len(one) and second < len(other):
        start, end = max(one[first].start, other[second].start), min(one[first].end, other[second].end)
        if start < end:
            found.append(Span(start, end))
        if one[first].end < other[second].end:
            first += 1
        else:
            second += 1
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)
