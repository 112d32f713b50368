"""Several devices for one model: results, order, back-pressure, and processes that die."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.artefacts.segments import decompose
from hasten.core.construct import construct
from hasten.core.errors import EngineError
from hasten.core.interfaces import Device, Graph, Stream, Target
from hasten.engines.placed import Crew, Placed, Schedule, Stage
from hasten.engines.shared import SharedMemory

ONNXRUNTIME = {"_target_": "hasten.engines.onnxruntime.OnnxRuntime", "threads": 1, "graph_optimization": "basic"}
"""With more, it chooses layouts by the graph as a whole, and a part of one adds up in another order."""
SLOW = {"_target_": "slow_engine.Slow", "seconds": 0.05}
FAKE = '''
import time
from dataclasses import dataclass

from hasten.core.interfaces import Engine


@dataclass(frozen=True, kw_only=True)
class Slow(Engine):
    """Twice its input after a while; of a negative one nothing but an error, and of a huge one no end."""

    family = "fake"
    libraries = ()
    seconds: float = 0.0

    def supports(self, quantized, target):
        return None

    def compile(self, graph, folder):
        pass

    def load(self, folder):
        return self.run

    def run(self, values):
        if (values < 0).any():
            raise ValueError("no negative\\nnumbers")
        time.sleep(1e6 if (values > 1e6).any() else self.seconds)
        return 2 * values

    def integer_share(self, folder):
        return 0.5

    def operators(self, folder, inputs, repeats):
        return []
'''


@pytest.fixture(autouse=True)
def _slow_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow_engine.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def devices(engine: dict[str, Any], number: int = 2) -> tuple[dict[str, Any], ...]:
    cpus = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return tuple({"name": f"core{place}", "cpus": [next(cpus)], "engine": engine} for place in range(number))


def fake(tmp_path: Path, routes: Sequence[Sequence[int]], *, number: int = 2, timeout: float = 30.0) -> Crew:
    """Stages that double, one after the other on the devices of a route; every device can run every stage."""
    anywhere = dict.fromkeys(range(number), "segment")
    (tmp_path / "segment").mkdir(exist_ok=True)
    schedule = Schedule(
        plan="test",
        devices=devices(SLOW, number),
        inputs=("input",),
        routes=tuple(
            tuple(
                Stage(writes=f"{place + 1}", reads=(f"{place}" if place else "input",), device=it, folders=anywhere)
                for place, it in enumerate(route)
            )
            for route in routes
        ),
        seconds=tuple(1.0 for _ in routes),
    )
    schedule.write(tmp_path)
    assert Schedule.read(tmp_path) == schedule
    runner = Placed(timeout=timeout).load(tmp_path)
    assert isinstance(runner, Crew)
    return runner


def numbers(count: int) -> Iterator[list[NDArray[Any]]]:
    return ([np.full((1, 3), number, np.float32)] for number in range(count))


@pytest.fixture
def split(graph: Graph, tmp_path: Path) -> Path:
    """The residual CNN on two devices, every segment compiled for both."""
    divided = decompose(graph, 4)
    divided = divided.merged([0, *(1 for _ in divided.segments[1:])])
    stages = []
    for number, (segment, part) in enumerate(zip(divided.segments, divided.write(tmp_path / "parts"), strict=True)):
        (tmp_path / "split" / f"{number}").mkdir(parents=True)
        construct(ONNXRUNTIME, "engine").compile(part, tmp_path / "split" / f"{number}")
        folders = {0: f"{number}", 1: f"{number}"}
        stages.append(Stage(writes=segment.writes, reads=segment.reads, device=number, folders=folders, layers=1))
    Schedule(
        plan="split",
        devices=devices(ONNXRUNTIME),
        inputs=graph.signature.names,
        routes=(tuple(stages),),
        seconds=(1.0,),
    ).write(tmp_path / "split")
    return tmp_path / "split"


def test_gives_what_the_undivided_graph_gives_bit_for_bit(graph: Graph, split: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    construct(ONNXRUNTIME, "engine").compile(graph, whole)
    run, shared = construct(ONNXRUNTIME, "engine").load(whole), Placed().load(split)
    assert isinstance(shared, Stream)
    draw = np.random.default_rng(0)
    requests = [[draw.standard_normal((rows, 3, 8, 8), dtype=np.float32)] for rows in (1, 4, 2, 9, 3, 1)]
    outputs = list(shared.stream(requests))
    for (inputs,), given in zip(requests, outputs, strict=True):
        np.testing.assert_array_equal(given, run(inputs))
    np.testing.assert_array_equal(shared(*requests[0]), outputs[0])
    assert [it.kind for it in Placed().operators(split, requests[0], 1)].count("convolution") > 1
    assert Placed().integer_share(split) == 0.0


def test_compiles_copies_where_nothing_was_measured(graph: Graph, tmp_path: Path) -> None:
    engine = Placed(between=devices(ONNXRUNTIME))
    engine.compile(graph, tmp_path)
    run = engine.load(tmp_path)
    assert isinstance(run, Crew)
    rows = np.zeros((2, 3, 8, 8), np.float32)
    assert [outputs.shape for outputs in run.stream([[rows]] * 3)] == [(2, 10)] * 3
    assert {entry.device for entry in run.trace} == {0, 1}


@pytest.mark.parametrize("routes", [[[0, 1]], [[0], [1]], [[0, 1, 0]]])
def test_results_come_in_the_order_of_the_requests(tmp_path: Path, routes: list[list[int]]) -> None:
    crew = fake(tmp_path, routes)
    factor = 2.0 ** len(routes[0])
    outputs = [float(values[0, 0]) for values in crew.stream(numbers(9))]
    assert outputs == [factor * number for number in range(9)]
    assert list(crew.stream([])) == []


def test_takes_no_more_requests_than_are_under_way(tmp_path: Path) -> None:
    crew, taken = fake(tmp_path, [[0, 1]]), []

    def endless() -> Iterator[list[NDArray[Any]]]:
        for number in itertools.count():
            taken.append(number)
            yield [np.full((1, 3), number, np.float32)]

    outputs = crew.stream(endless())
    for number in range(6):
        assert next(outputs)[0, 0] == 4 * number
        assert len(taken) <= number + crew.in_flight
    outputs.close()
    assert crew(np.ones((1, 3), np.float32))[0, 0] == 4


def test_devices_work_at_the_same_time(tmp_path: Path) -> None:
    crew = fake(tmp_path, [[0, 1]])
    assert len(list(crew.stream(numbers(6)))) == 6
    one, other = ([it for it in crew.trace if it.device == device] for device in (0, 1))
    assert any(a.start < b.end and b.start < a.end for a in one for b in other)


@pytest.mark.parametrize("routes", [[[0, 1]], [[0], [1]]])
def test_a_device_that_is_killed_is_replaced_and_nothing_is_lost_or_done_twice(
    tmp_path: Path, routes: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    crew = fake(tmp_path, routes)
    factor, outputs = 2 ** len(routes[0]), []
    for number, values in enumerate(crew.stream(numbers(12))):
        outputs.append(float(values[0, 0]))
        if number == 3:
            crew._processes[1].process.send_signal(signal.SIGKILL)
    assert outputs == [factor * number for number in range(12)]
    assert "core1 is lost: it died of signal SIGKILL" in caplog.text
    assert {entry.device for entry in list(crew.trace)[-3:]} == {0}
    assert crew(np.ones((1, 3), np.float32))[0, 0] == factor


def test_a_device_that_hangs_is_given_up(tmp_path: Path) -> None:
    crew = fake(tmp_path, [[0, 1]], timeout=3.0)
    with pytest.raises(EngineError, match="no device is left that can run"):
        crew(np.full((1, 3), 1e7, np.float32))
    with pytest.raises(EngineError, match="have ended"):
        crew(np.ones((1, 3), np.float32))


def test_an_error_is_told_for_its_request_and_the_devices_go_on(tmp_path: Path) -> None:
    crew = fake(tmp_path, [[0, 1]])
    wrong = [[np.full((1, 3), number, np.float32)] for number in (1, 2, -1, 3, 4)]
    outputs = crew.stream(wrong)
    assert [next(outputs)[0, 0] for _ in range(2)] == [4, 8]
    with pytest.raises(EngineError, match="core0: ValueError: no negative numbers"):
        next(outputs)
    assert crew(np.ones((1, 3), np.float32))[0, 0] == 4


def test_what_can_not_be_loaded_is_told_at_once(split: Path) -> None:
    (split / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="core1: onnxruntime refused the graph"):
        Placed().load(split)


def test_its_processes_end_with_their_parent(tmp_path: Path) -> None:
    fake(tmp_path, [[0, 1]]).close()
    code = (
        "import sys; from pathlib import Path; from hasten.engines.placed import Placed\n"
        f"crew = Placed().load(Path({str(tmp_path)!r}))\n"
        "print(*(it.process.pid for it in crew._processes), flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert all(alive(pid) for pid in pids)
        parent.kill()
    for _ in range(200):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_shared_memory_grows_and_keeps_types() -> None:
    memory = SharedMemory.create(2)
    try:
        small = memory.read(memory.write(0, np.arange(3)))
        large = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
        np.testing.assert_array_equal(memory.read(memory.write(1, large)), large)
        np.testing.assert_array_equal(small, [0, 1, 2])
        for values in (large.T, np.empty((0, 3)), np.array(2, np.int8), np.ones(70000, bool)):
            header = memory.write(0, values)
            np.testing.assert_array_equal(memory.read(header), values)
            assert memory.read(header).dtype == values.dtype
    finally:
        memory.close()


def test_says_why_it_can_not_serve_a_target() -> None:
    target = Target(device="cpu", threads=2, batch_size=1, engines=("placed",))
    assert "target=mixed" in (Placed().supports(False, target) or "")
    there, stranger = min(os.sched_getaffinity(0)), 4096
    mine, missing = (Device(name="a", engine="onnxruntime", cpus=(cpu,)) for cpu in (there, stranger))
    assert Placed().supports(False, Target(**{**vars(target), "devices": (mine, mine)})) is None
    assert "a is on CPU 4096" in (Placed().supports(False, Target(**{**vars(target), "devices": (missing,)})) or "")
