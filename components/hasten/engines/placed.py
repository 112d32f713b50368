"""One model on several devices: the segments of its graph, each on its device, or whole copies beside one another.

A compiled folder holds `schedule.json` and, below `segments/`, what the engines of the devices compiled. Each device is
a process of its own (`engines.device`). Requests go through their stages by messages of a few hundred bytes between
those processes and this one, tensors through shared memory; a device has its next task at hand before it has finished
the one before, so that it does not wait for the way of the messages.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt

from hasten.artefacts.deployed import SCHEDULE
from hasten.core.construct import construct
from hasten.core.errors import EngineError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.core.interpreter import import_path
from hasten.engines.shared import SharedMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SEGMENTS = "segments"
_TRACED = 512
"""Stages whose times are kept, the latest ones."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Part of a route.

    Attributes:
        writes: name of its result.
        reads: names of inputs of the model and of results of other stages of the route.
        device: number of the one that runs it.
        folders: device -> where in the compiled folder lies what its engine compiled, for every device that can run
            it, since a device may die; the empty text for a stage that gives back what it reads.
        layers: convolutions and linear layers in it.
    """

    writes: str
    reads: tuple[str, ...]
    device: int
    folders: Mapping[int, str]
    layers: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who does what.

    Attributes:
        plan: what it is called, for people.
        devices: `name`, `engine` (config node) and `cpus` of each.
        inputs: names of the model's inputs, in their order.
        routes: ways that a request may take, each a list of stages of which the last gives the model's output. Requests
            are spread over the routes.
        seconds: from one request to the next of each route, as predicted: where a request would be finished first, it
            goes.
    """

    plan: str
    devices: tuple[Mapping[str, Any], ...]
    inputs: tuple[str, ...]
    routes: tuple[tuple[Stage, ...], ...]
    seconds: tuple[float, ...]

    @property
    def alone(self) -> Stage | None:
        """The only stage where one device does everything: then there is nothing to hand over."""
        return self.routes[0][0] if len(self.routes) == 1 and len(self.routes[0]) == 1 else None

    def write(self, folder: Path) -> None:
        routes = [[{**vars(stage), "folders": dict(stage.folders)} for stage in route] for route in self.routes]
        write_json(
            folder / SCHEDULE, {**vars(self), "devices": [dict(each) for each in self.devices], "routes": routes}
        )

    @classmethod
    def read(cls, folder: Path) -> Schedule:
        values = read_json(folder / SCHEDULE)
        return cls(
            plan=values["plan"],
            devices=tuple(values["devices"]),
            inputs=tuple(values["inputs"]),
            routes=tuple(tuple(map(_stage, route)) for route in values["routes"]),
            seconds=tuple(values["seconds"]),
        )


def _stage(values: Mapping[str, Any]) -> Stage:
    folders = {int(device): folder for device, folder in values["folders"].items()}
    return Stage(**{**values, "reads": tuple(values["reads"]), "folders": folders})


class Traced(NamedTuple):
    """From when to when a device worked on a stage, in nanoseconds of the machine's monotonic clock."""

    request: int
    stage: str
    device: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Placed(Engine):
    """Runs a graph on the devices of `target.devices` as its schedule says.

    How the work is divided is measured and decided by the compile stage (`stages.placing`). On its own, `compile` puts
    the whole graph on every device: requests in a stream are spread over them.

    Attributes:
        between: the devices: `name`, `engine` and `cpus` of each. Within a recipe an engine is an option of the group
            `engine`; the compile stage puts the config node of that option in its place.
        optimize: what the schedule is chosen by: rows per second (`throughput`), or else the time of a request.
        max_segments: into how many segments the graph is divided at most. More of them can be shared out more evenly
            and take longer to measure.
        in_flight: requests that each device may have before it; with 1 it waits for messages in between.
        timeout: seconds that one stage may take before its device counts as dead.
    """

    family = "openvino"
    libraries = ()
    devices = ("cpu", "gpu", "tpu", "fpga")
    streams = True

    between: tuple[Any, ...] = ()
    optimize: Literal["p50", "p90", "p99", "throughput", "size", "memory"] = "p50"
    max_segments: Annotated[int, Ge(1)] = 8
    in_flight: Annotated[int, Ge(1)] = 2
    timeout: Annotated[float, Gt(0)] = 120.0

    def supports(self, quantized: bool, target: Target) -> str | None:
        if not target.devices:
            return "target.devices names none to share the work: choose target=mixed"
        if not (hasattr(os, "memfd_create") and hasattr(os, "sched_setaffinity")):
            return "it shares memory between pinned processes as only Linux can"
        usable = os.sched_getaffinity(0)
        for device in target.devices:
            if strangers := set(device.cpus) - usable:
                there = ", ".join(map(str, sorted(usable)))
                return f"target.devices: {device.name} is on CPU {min(strangers)}, and this process may use {there}"
        return None

    def compile(self, graph: Graph, folder: Path) -> None:
        engines: list[Any] = []
        routes: list[tuple[Stage, ...]] = []
        for number, device in enumerate(self.between):
            place = f"{SEGMENTS}/0/{device['name']}"
            same = next((other for other, it in enumerate(engines) if it == device["engine"]), None)
            if same is not None:
                place = routes[same][0].folders[same]
            else:
                (folder / place).mkdir(parents=True)
                construct(device["engine"], "engine").compile(graph, folder / place)
            engines.append(device["engine"])
            stage = Stage(
                writes="output", reads=graph.signature.names, device=number, folders={number: place}, layers=1
            )
            routes.append((stage,))
        Schedule(
            plan="replicas",
            devices=self.between,
            inputs=graph.signature.names,
            routes=tuple(routes),
            seconds=tuple(1.0 for _ in routes),
        ).write(folder)

    def load(self, folder: Path) -> Runner:
        schedule = Schedule.read(folder)
        stage = schedule.alone
        if stage is not None and stage.folders[stage.device]:
            engine: Engine = construct(schedule.devices[stage.device]["engine"], "engine")
            return engine.load(folder / stage.folders[stage.device])
        return Crew(folder, schedule, in_flight=self.in_flight, timeout=self.timeout)

    def integer_share(self, folder: Path) -> float:
        schedule = Schedule.read(folder)
        stages = [stage for route in schedule.routes for stage in route]
        integers = sum(
            stage.layers * _engine(schedule, stage).integer_share(folder / stage.folders[stage.device])
            for stage in stages
        )
        return integers / (sum(stage.layers for stage in stages) or 1)

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """Those of every stage of a route, one stage after the other, by the engines of their devices."""
        schedule = Schedule.read(folder)
        values = dict(zip(schedule.inputs, inputs, strict=True))
        found: list[OperatorTime] = []
        for stage in schedule.routes[0]:
            engine, place = _engine(schedule, stage), folder / stage.folders[stage.device]
            given = [values[name] for name in stage.reads]
            found += engine.operators(place, given, repeats)
            values[stage.writes] = engine.load(place)(*given)
        return found


def _engine(schedule: Schedule, stage: Stage) -> Engine:
    engine: Engine = construct(schedule.devices[stage.device]["engine"], "engine")
    return engine


@dataclass(kw_only=True)
class _Request:
    """One under way. `values`: name of each tensor that is there -> where; `error`: what its engine raised."""

    number: int
    slot: int
    route: int
    values: dict[str, Mapping[str, Any]]
    begun: set[int] = field(default_factory=set)
    error: str | None = None
    running: int = 0

    @property
    def finished(self) -> bool:
        return self.running == 0 and (self.error is not None or self.values.keys() >= {_RESULT})


_RESULT = "\0result"
"""Under which name the output of a request lies, whatever its stage calls it."""


class _Task(NamedTuple):
    request: _Request
    stage: int


class _Process:
    """A device's process, and what it has been asked and not yet answered."""

    def __init__(self, number: int, device: Mapping[str, Any], memory: SharedMemory) -> None:
        self.number, self.name = number, str(device["name"])
        threads = str(len(device["cpus"]))
        pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hasten.engines.device"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=memory.descriptors,
            env={**os.environ, **pools, "PYTHONPATH": import_path()},
        )
        self.asked: dict[int, _Task | None] = {}
        self.alive = True
        self._unread = b""
        start = {"cpus": list(device["cpus"]), "engine": device["engine"], "memory": list(memory.descriptors)}
        self._write(start)

    @property
    def answers(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def ask(self, number: int, task: _Task | None, message: Mapping[str, Any]) -> None:
        self.asked[number] = task
        self._write({"task": number, **message})

    def read(self) -> list[dict[str, Any]] | None:
        """The answers that have come in; None where the process is dead."""
        chunk = os.read(self.answers, 1 << 16)
        if not chunk:
            return None
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> str:
        """Ends it, if it has not yet, and says what it died of."""
        self.alive = False
        if self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):  # its pipe is closed: it is about to have an exit code
                self.process.wait(timeout=0.5)
        _kill(self.process)
        code = self.process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, as the end of its answers will tell
            self.process.stdin.write(json.dumps(message).encode() + b"\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


class Crew:
    """The processes of a schedule's devices, at work on several requests at once. It is a `core.interfaces.Stream`.

    A device that dies or hangs is left out from then on: what it was asked and had not answered is done by another one
    that can, so that every request is answered once. Where none can, EngineError is raised and all processes end.

    Several callers wait for one another. The processes end with this object or with the process that it lives in.

    Args:
        folder: compiled folder.
        in_flight: requests that each device may have before it.
        timeout: seconds that one stage may take.
    """

    def __init__(self, folder: Path, schedule: Schedule, *, in_flight: int, timeout: float) -> None:
        self.schedule = schedule
        self.in_flight = in_flight * len({stage.device for route in schedule.routes for stage in route})
        self.trace: deque[Traced] = deque(maxlen=_TRACED)
        self._folder, self._timeout = folder.absolute(), timeout
        self._turn = Lock()
        self._num_asked = 0
        self._num_requests = 0
        self._places = len(schedule.inputs) + max(len(route) for route in schedule.routes)
        self._memory = SharedMemory.create(self.in_flight * self._places)
        self._processes = [_Process(number, it, self._memory) for number, it in enumerate(schedule.devices)]
        self._selector = selectors.DefaultSelector()
        self._close = weakref.finalize(self, _end, self._processes, self._selector, self._memory)
        for process in self._processes:
            self._selector.register(process.answers, selectors.EVENT_READ, process)
        self._load()

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        (outputs,) = self.stream([inputs])
        return outputs

    def stream(self, requests: Iterable[Sequence[NDArray[Any]]]) -> Iterator[NDArray[Any]]:
        """The outputs in the order of the requests, of which no more are taken than are under way.

        Stages are handed on while the caller waits for an output. A caller that is busy meanwhile does not stop the
        devices as long as they have requests before them.

        Raises:
            EngineError: an engine raised, for the request that is due, or no device is left for a stage.
        """
        with self._alone():
            waiting, source, slots = deque[_Request](), iter(requests), set(range(self.in_flight))
            try:
                while True:
                    while slots and (inputs := next(source, None)) is not None:
                        waiting.append(self._begin(inputs, slots.pop(), waiting))
                    if not waiting:
                        return
                    outputs = self._finish(waiting[0])
                    slots.add(waiting.popleft().slot)
                    yield outputs
            finally:
                self._drain(waiting)

    def close(self) -> None:
        """Ends the processes."""
        self._close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=self._timeout):
            raise EngineError("the devices are busy with a stream that was not read to its end")
        try:
            if not self._close.alive:
                raise EngineError("the devices' processes have ended")
            yield
        finally:
            self._turn.release()

    def _load(self) -> None:
        """Has every device load its stages, and waits for it: what can't be loaded is told at once."""
        for route in self.schedule.routes:
            for stage in route:
                self._ask(stage.device, None, {"folder": self._path(stage, stage.device), "reads": [], "writes": None})
        failed: list[str] = []
        while any(process.asked for process in self._processes):
            failed += self._wait()
        if failed:
            self.close()
            raise EngineError(failed[0])

    def _begin(self, inputs: Sequence[NDArray[Any]], slot: int, waiting: Iterable[_Request]) -> _Request:
        first = slot * self._places
        pairs = enumerate(zip(self.schedule.inputs, inputs, strict=True))
        values = {name: self._memory.write(first + place, np.asarray(array)) for place, (name, array) in pairs}
        request = _Request(number=self._num_requests, slot=slot, route=self._route(waiting), values={**values})
        self._num_requests += 1
        self._go_on(request)
        return request

    def _route(self, waiting: Iterable[_Request]) -> int:
        """The one that would have finished another request first."""
        before = [request.route for request in waiting if not request.finished]
        seconds = self.schedule.seconds
        return min(range(len(seconds)), key=lambda route: (before.count(route) + 1) * seconds[route])

    def _go_on(self, request: _Request) -> None:
        """Hands out the stages of a request whose tensors are there."""
        for number, stage in enumerate(self.schedule.routes[request.route]):
            if number not in request.begun and request.values.keys() >= set(stage.reads):
                request.begun.add(number)
                request.running += 1
                self._hand_out(_Task(request, number))

    def _hand_out(self, task: _Task) -> None:
        request = task.request
        stage = self.schedule.routes[request.route][task.stage]
        device = self._able(stage)
        place = request.slot * self._places + len(self.schedule.inputs) + task.stage
        reads = [request.values[name] for name in stage.reads]
        self._ask(device, task, {"folder": self._path(stage, device), "reads": reads, "writes": place})

    def _able(self, stage: Stage) -> int:
        """The stage's own device, or in its place the least busy one that can run the stage."""
        if self._processes[stage.device].alive:
            return stage.device
        others = [self._processes[device] for device in stage.folders if self._processes[device].alive]
        if not others:
            self.close()
            raise EngineError(f"no device is left that can run {stage.writes}")
        return min(others, key=lambda process: len(process.asked)).number

    def _path(self, stage: Stage, device: int) -> str:
        return str(self._folder / stage.folders[device]) if stage.folders[device] else ""

    def _ask(self, device: int, task: _Task | None, message: Mapping[str, Any]) -> None:
        self._num_asked += 1
        self._processes[device].ask(self._num_asked, task, message)

    def _finish(self, request: _Request) -> NDArray[Any]:
        while not request.finished:
            self._wait()
        if request.error is not None:
            raise EngineError(request.error)
        return self._memory.read(request.values[_RESULT]).copy()

    def _drain(self, waiting: Iterable[_Request]) -> None:
        """Waits for what has been begun and nobody wants any more, so that its memory is free again."""
        for request in waiting:
            request.error = request.error or "not wanted any more"
        while self._close.alive and any(request.running for request in waiting):
            self._wait()

    def _wait(self) -> list[str]:
        """Waits for answers and goes on with their requests; the answer is what loading has failed of."""
        ready = self._selector.select(self._timeout)
        if not ready:
            hung = next(process for process in self._processes if process.asked and process.alive)
            hung.process.kill()
            self._lost(hung, f"took longer than {self._timeout:g} s")
            return []
        failed = []
        for key, _ in ready:
            process: _Process = key.data
            answers = process.read() if process.alive else []
            if answers is None:
                self._lost(process, "")
                continue
            for answer in answers:
                task = process.asked.pop(answer["task"])
                if task is not None:
                    self._answered(task, process, answer)
                elif "error" in answer:
                    failed.append(f"{process.name}: {answer['error']}")
        return failed

    def _answered(self, task: _Task, process: _Process, answer: Mapping[str, Any]) -> None:
        request, route = task.request, self.schedule.routes[task.request.route]
        stage = route[task.stage]
        request.running -= 1
        if "error" in answer:
            request.error = request.error or f"{process.name}: {answer['error']}"
            return
        self.trace.append(Traced(request.number, stage.writes, process.number, answer["start"], answer["end"]))
        request.values[_RESULT if task.stage == len(route) - 1 else stage.writes] = answer["header"]
        if request.error is None:
            self._go_on(request)

    def _lost(self, process: _Process, why: str) -> None:
        """Gives what a dead device had before it to others, in the order in which it was asked."""
        self._selector.unregister(process.answers)
        cause = process.end()
        tasks, process.asked = list(process.asked.values()), {}
        log.warning("device %s is lost: %s", process.name, why or f"it died of {cause}")
        if None in tasks:
            self.close()
            raise EngineError(f"device {process.name} died of {cause} while it loaded its segments")
        for task in tasks:
            assert task is not None
            self._hand_out(task)


def _end(processes: Sequence[_Process], selector: selectors.BaseSelector, memory: SharedMemory) -> None:
    for process in processes:
        if process.alive:
            process.alive = False
            _kill(process.process)
    selector.close()
    memory.close()
