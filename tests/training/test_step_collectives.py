"""What a trace says of collectives and of those who wait for them, on traces made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.trial import Collective
from hasten.training.step_collectives import Communication, Span, both, length, less, mean_of, union

TRAINS, BACKEND = 1, 2


@dataclass
class Trace:
    """As much of a profiler as is looked at: events of operators, and those of the backend as its results have them."""

    began_ns: int = 5_000_000
    operators: list[Any] = field(default_factory=list)
    flights: list[Any] = field(default_factory=list)

    def ran(self, name: str, start: float, end: float, thread: int = TRAINS) -> Trace:
        """Times in milliseconds."""
        times = SimpleNamespace(start=1e3 * start, end=1e3 * end)
        self.operators.append(SimpleNamespace(name=name, time_range=times, thread=thread, is_async=False))
        return self

    def flew(self, name: str, start: float, end: float, *shape: int, of: str = "float") -> Trace:
        values = {
            "name": name,
            "start_ns": self.began_ns + round(1e6 * start),
            "duration_ns": round(1e6 * (end - start)),
            "start_thread_id": BACKEND,
            "shapes": [list(shape)],
            "dtypes": [of],
        }
        self.flights.append(SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()}))
        return self

    def events(self) -> list[Any]:
        return self.operators

    @property
    def profiler(self) -> Any:
        results = SimpleNamespace(events=lambda: self.flights, trace_start_ns=lambda: self.began_ns)
        return SimpleNamespace(kineto_results=results)

    @property
    def communication(self) -> Communication:
        return Communication.of(self)  # type: ignore[arg-type]


def step() -> Trace:
    """A forward pass of 10 ms, and a backward pass that calculates from 10 to 20 ms and ends after 30."""
    trace = Trace().ran("forward", 0, 10).ran("backward", 10, 30).ran("aten::mm", 0, 10)
    return trace.ran("aten::mm", 10, 20).ran("aten::add_", 29, 30)


def test_what_lies_beside_calculation_is_not_waited_for() -> None:
    found = step().flew("gloo:all_reduce", 12, 28, 1000).communication
    assert found.collectives == {
        "all_reduce": Collective(kind="all_reduce", calls=1, num_bytes=4000, milliseconds=16, waited_ms=8)
    }
    assert found.collectives["all_reduce"].hidden == pytest.approx(0.5)
    assert found.waiting_ms["backward"] == pytest.approx(8)
    assert sum(found.waiting_ms.values()) == pytest.approx(8)


def test_several_at_once_take_the_time_of_one() -> None:
    trace = step().flew("gloo:all_reduce", 12, 22, 100).flew("gloo:all_reduce", 14, 26, 100)
    found = trace.flew("gloo:broadcast", 24, 25, 10, of="c10::BFloat16").communication
    assert found.collectives["all_reduce"].milliseconds == pytest.approx(14)
    assert found.collectives["all_reduce"].calls == 2
    assert found.collectives["broadcast"].num_bytes == 20
    assert found.collectives["broadcast"].waited_ms == 0  # for the other, at that time
    assert found.waiting_ms["backward"] == pytest.approx(6)


def test_python_between_operators_is_no_waiting_where_nothing_arrives() -> None:
    trace = Trace().ran("forward", 0, 20).ran("aten::mm", 0, 5).ran("aten::mm", 9, 20)
    assert trace.flew("gloo:all_gather", 1, 15, 8).communication.waiting_ms["forward"] == 0


def test_an_end_that_is_written_down_late_is_one() -> None:
    trace = step().ran("aten::mul_", 30, 50).flew("gloo:all_reduce", 20, 35, 8)
    assert trace.communication.waiting_ms["backward"] == pytest.approx(9)


def test_an_operator_that_waits_is_no_calculation() -> None:
    trace = Trace().ran("forward", 0, 20).ran("aten::mm", 0, 20).ran("_c10d_functional::wait_tensor", 5, 15)
    assert trace.flew("gloo:all_reduce", 4, 14, 8).communication.waiting_ms["forward"] == pytest.approx(9)


def test_what_a_hook_calculates_in_the_backends_thread_is_not_communication() -> None:
    trace = step().ran("aten::copy_", 24, 27, BACKEND).flew("gloo:all_reduce", 20, 28, 8)
    found = trace.communication
    assert found.collectives["all_reduce"].milliseconds == pytest.approx(5)
    assert found.waiting_ms["backward"] == pytest.approx(5)


def test_what_came_before_the_step_is_left_out_and_what_is_outside_of_its_phases_is_other() -> None:
    trace = Trace().ran("forward", 10, 20).ran("aten::mm", 10, 20).ran("aten::add", 39, 40)
    found = trace.flew("gloo:barrier", 1, 9).flew("gloo:all_reduce", 25, 35, 8).communication
    assert set(found.collectives) == {"all_reduce"}
    assert found.waiting_ms["other"] == pytest.approx(10)


def test_a_trace_without_a_step_tells_nothing() -> None:
    assert Trace().flew("gloo:all_reduce", 0, 1, 8).communication == Communication(collectives={}, waiting_ms={})


def test_steps_of_which_some_communicate_are_told_by_their_mean() -> None:
    steps = [step().communication, step().communication, step().flew("gloo:all_reduce", 20, 26, 9).communication]
    collectives, waiting_ms = mean_of(steps)
    assert collectives == (Collective(kind="all_reduce", calls=1 / 3, num_bytes=12, milliseconds=2, waited_ms=2),)
    assert waiting_ms["backward"] == pytest.approx(2)
    assert mean_of([]) == ((), {})


SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: Span(pair[0], pair[0] + pair[1])), max_size=6
)


@given(SPANS, SPANS)
def test_spans_are_sets_of_time(some: list[Span], others: list[Span]) -> None:
    def moments(spans: list[Span]) -> set[float]:
        return {moment for span in spans for moment in range(int(span.start), int(span.end))}

    one, other = union(some), union(others)
    assert moments(one) == moments(some)
    assert moments(both(one, other)) == moments(some) & moments(others)
    assert moments(less(one, other)) == moments(some) - moments(others)
    assert length(one) == len(moments(some))
