"""How a model is shared out between the devices of a target: measured, scheduled, measured again, chosen.

Every segment of the graph is compiled for and timed on every device that can run it, and so is the way from one device
to another, through the processes and the memory that serve later. What the schedules predict is then held against the
clock: the whole model on each single device, divided for latency and for throughput, and a copy on every device run in
turns, and the best by measurement is what the folder gets. Several devices have to be measurably faster than one.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file

from hasten.artefacts.operators import kind
from hasten.artefacts.segments import Divided, Segment, decompose
from hasten.core.construct import construct
from hasten.core.errors import EngineError
from hasten.core.files import digest, write_json
from hasten.core.interfaces import Engine, Graph, Progress, Target
from hasten.core.trial import Interval
from hasten.engines.placed import SEGMENTS, Schedule, Stage
from hasten.evidence import latency
from hasten.evidence.process import Worker
from hasten.evidence.worker import ENGINE_FILE, write_inputs
from hasten.hardware.placement import (
    Assignment,
    Entry,
    Work,
    lowest_latency,
    makespan,
    most_throughput,
    period,
    timetable,
)

log = logging.getLogger(__name__)

PLACEMENT = "placement.json"
IN_TURNS = latency.LatencyProtocol(min_rounds=8, max_rounds=20, max_seconds=30.0, precision=0.02)
CALLS, SECONDS = 5, 0.15
"""Of each segment on each device, at least."""
SIZES = (1 << 10, 1 << 20)
"""Bytes of the two tensors whose way between two devices is timed."""
DRAWN = range(4, 10)
"""Requests of a full pipeline that the Gantt chart shows."""
MOVES = 3
"""Times that all bounds between devices are tried a segment away, at most."""
INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to share out the work.

    Attributes:
        name: what it is called, for people.
        seconds: predicted: of a request, or from one to the next where throughput is optimised.
        bars: predicted Gantt chart; of a plan with one device, none.
    """

    name: str
    folder: Path
    devices: tuple[str, ...]
    seconds: float
    stages: tuple[str, ...]
    bars: tuple[Entry, ...] = ()

    @property
    def is_single(self) -> bool:
        return len(self.devices) == 1


@dataclass(frozen=True, kw_only=True)
class _Device:
    """A device with its engine. `able`: can it run the whole graph; `takes_parts`: and segments of it."""

    name: str
    cpus: tuple[int, ...]
    node: Mapping[str, Any]
    able: bool
    takes_parts: bool


def place(
    graph: Graph, node: Mapping[str, Any], target: Target, seed: int, folder: Path, progress: Progress
) -> tuple[str, ...]:
    """Writes the chosen schedule with what the engines of its devices compiled, and `placement.json` with all figures.

    Args:
        node: of the engine, with the nodes of its devices' engines (`stages.engine.engine_node`).

    Returns:
        What the report should say of the choice, one sentence each.

    Raises:
        EngineError: no device can run the graph, or one failed while it was measured.
    """
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        placing = _Placing(graph=graph, node=node, target=target, scratch=Path(scratch), progress=progress)
        plans = placing.plans()
        measured = _in_turns(plans, placing, seed)
        choice = choose(plans, measured, placing.throughput)
        chosen = next(plan for plan in plans if plan.name == choice["chosen"])
        shutil.copytree(chosen.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ENGINE_FILE))
        write_json(folder / ENGINE_FILE, dict(node))
        charts = [placing.chart(plan) for plan in plans if plan.bars]
        write_json(folder / PLACEMENT, {**placing.figures(), **choice, "charts": charts})
        return (choice["why"],)


def choose(plans: Sequence[Plan], measured: latency.Measurement, throughput: bool) -> dict[str, Any]:
    """The plan that measured best, as plain values: what is `chosen`, `why`, and the figures of all `plans`.

    One device is chosen where no other plan is faster than the best single one with the lower end of its interval.
    """
    confidence, statistic = measured.protocol.confidence, "mean" if throughput else "p50"

    def seconds(name: str) -> Interval:
        if throughput:
            rate = latency.throughput(measured, confidence, name)
            rows = measured.batch_size
            return Interval(value=rows / rate.value, low=rows / rate.high, high=rows / rate.low)
        p50 = latency.latency_ms(measured, confidence, name)["p50"]
        return Interval(value=1e-3 * p50.value, low=1e-3 * p50.low, high=1e-3 * p50.high)

    names = dict(zip((plan.name for plan in plans), _participants(plans), strict=True))
    times = {plan.name: seconds(names[plan.name]) for plan in plans}
    single = min((plan for plan in plans if plan.is_single), key=lambda plan: times[plan.name].value)
    ratios = {plan.name: _ratio(measured, names[plan.name], names[single.name], statistic) for plan in plans}
    best = max(plans, key=lambda plan: ratios[plan.name].value)
    gain = ratios[best.name]
    shared = not best.is_single and gain.low > 1
    chosen = best if shared else single
    what = "the rows per second" if throughput else "the speed"
    told = f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}] {what} of the best single device, {single.name}"
    if shared:
        why = f"The plan `{best.name}` gives {told}: it is used."
    elif best.is_single:
        why = f"No plan for several devices is faster than the best single device: {single.name} is used."
    else:
        why = f"The plan `{best.name}` gives {told}, which is no measurable gain: {single.name} is used."
    return {
        "chosen": chosen.name,
        "why": why,
        "plans": [
            {
                "name": plan.name,
                "devices": list(plan.devices),
                "stages": list(plan.stages),
                "predicted_seconds": plan.seconds,
                "seconds": vars(times[plan.name]),
                "ratio": vars(ratios[plan.name]),
            }
            for plan in plans
        ],
    }


def _participants(plans: Sequence[Plan]) -> list[str]:
    return [latency.CANDIDATE, *(plan.name for plan in plans[1:])]


def _ratio(measured: latency.Measurement, name: str, single: str, statistic: str) -> Interval:
    if name == single:
        return Interval(value=1.0, low=1.0, high=1.0)
    blocks = {latency.CANDIDATE: measured.blocks_us[name], "single": measured.blocks_us[single]}
    return latency.speedups(replace(measured, blocks_us=blocks), measured.protocol.confidence, statistic)["single"]


def _in_turns(plans: Sequence[Plan], placing: _Placing, seed: int) -> latency.Measurement:
    first, *others = plans
    placing.progress.start("measuring plans", IN_TURNS.max_rounds)
    try:
        return latency.measure(
            first.folder,
            {plan.name: plan.folder for plan in others},
            placing.target,
            placing.rows,
            IN_TURNS,
            seed,
            stream=placing.throughput,
            on_round=placing.progress.advance,
        )
    finally:
        placing.progress.stop()


@dataclass(frozen=True, kw_only=True)
class _Placing:
    """What is measured once and used by several plans."""

    graph: Graph
    node: Mapping[str, Any]
    target: Target
    scratch: Path
    progress: Progress
    known: dict[str, _Parts] = field(default_factory=dict)

    @property
    def throughput(self) -> bool:
        return bool(self.node["optimize"] == "throughput")

    @cached_property
    def rows(self) -> list[np.ndarray[Any, Any]]:
        reference = load_file(self.graph.reference)
        return [reference[f"inputs.{name}"] for name in self.graph.signature.names]

    @cached_property
    def devices(self) -> tuple[_Device, ...]:
        found = []
        for it in self.node["between"]:
            engine: Engine = construct(it["engine"], "engine")
            alone = replace(self.target, devices=(), threads=len(it["cpus"]))
            reason = engine.supports(self.graph.quantized, alone)
            if reason is not None:
                log.warning("device %s is left out: %s", it["name"], reason)
            parts = reason is None and engine.reads_onnx
            found.append(
                _Device(
                    name=it["name"],
                    cpus=tuple(it["cpus"]),
                    node=it["engine"],
                    able=reason is None,
                    takes_parts=parts,
                )
            )
        if not any(device.able for device in found):
            raise EngineError("none of target.devices can run the graph")
        return tuple(found)

    @cached_property
    def divided(self) -> Divided:
        return decompose(self.graph, self.node["max_segments"])

    @cached_property
    def parts(self) -> _Parts:
        return self._parts(self.divided)

    @cached_property
    def whole(self) -> _Parts:
        """The graph as one part, which engines that read no ONNX can run, too."""
        takers = [device.able for device in self.devices]
        return self._made([self.graph], ["whole"], takers)

    def _parts(self, divided: Divided) -> _Parts:
        """Those segments, of which the new ones are compiled and timed."""
        names = [_name(segment) for segment in divided.segments]
        if not set(names) <= self.known.keys():
            graphs = divided.write(self.scratch / "graphs" / str(len(self.known)))
            new = [(graph, name) for graph, name in zip(graphs, names, strict=True) if name not in self.known]
            takers = [device.takes_parts for device in self.devices]
            made = self._made([graph for graph, _ in new], [name for _, name in new], takers)
            self.known.update((name, made.only(number)) for number, (_, name) in enumerate(new))
        return _Parts.together([self.known[name] for name in names])

    def _made(self, graphs: Sequence[Graph], names: Sequence[str], takers: Sequence[bool]) -> _Parts:
        """Compiled and timed. Devices that will be at work at the same time are timed at the same time: they share
        caches and memory."""
        folder = self.scratch / "compiled"
        compiled = tuple(
            _compiled(graph, name, takers, self.devices, folder) for graph, name in zip(graphs, names, strict=True)
        )
        inputs = [
            _request(graph, self.target.batch_size, folder / f"{name}.npz")
            for graph, name in zip(graphs, names, strict=True)
        ]
        at_once = len(self.devices) if self.throughput else 1
        with latency.measuring_alone(), ThreadPoolExecutor(at_once) as pool:
            times = [
                pool.submit(_timed, device, [it.get(number) for it in compiled], inputs, folder)
                for number, device in enumerate(self.devices)
            ]
            columns = [future.result() for future in times]
        return _Parts(
            folder=folder,
            compiled=compiled,
            seconds=tuple(zip(*columns, strict=True)),
            layers=tuple(_num_layers(graph) for graph in graphs),
        )

    def work(self, divided: Divided, parts: _Parts) -> Work:
        """Segments as the schedules see them."""
        place = {segment.writes: number for number, segment in enumerate(divided.segments)}
        return Work(
            reads=tuple(tuple(place[name] for name in segment.reads if name in place) for segment in divided.segments),
            seconds=parts.seconds,
            transfers=tuple(
                self._transfers(segment.row_bytes * self.target.batch_size) for segment in divided.segments
            ),
        )

    def _transfers(self, num_bytes: float) -> tuple[tuple[float, ...], ...]:
        devices = range(len(self.devices))
        return tuple(
            tuple(0.0 if one == other else self.ways[one, other].seconds(num_bytes) for other in devices)
            for one in devices
        )

    @cached_property
    def ways(self) -> dict[tuple[int, int], _Way]:
        """From each device to each other one."""
        numbers = range(len(self.devices))
        with latency.measuring_alone():
            into = {device: [self._way_seconds((device,), size) for size in SIZES] for device in numbers}
            pairs = [(one, other) for one in numbers for other in numbers if one != other]
            found = {}
            for one, other in pairs:
                seconds = [self._way_seconds((one, other), size) for size in SIZES]
                # Of a request, what the second device adds; of a full pipeline, all that keeps a device from working.
                least = [0.0, 0.0] if self.throughput else into[one]
                found[one, other] = _Way.through([max(0.0, it - less) for it, less in zip(seconds, least, strict=True)])
        return found

    def _way_seconds(self, devices: Sequence[int], num_bytes: int) -> float:
        """Of a tensor that goes through these devices and back, with nothing done on the way."""
        folder = self.scratch / "ways" / f"{'-'.join(map(str, devices))}-{num_bytes}"
        names = ["input", *(f"copy {number}" for number in range(len(devices)))]
        stages = tuple(
            Stage(writes=after, reads=(before,), device=device, folders={device: ""})
            for device, before, after in zip(devices, names[:-1], names[1:], strict=True)
        )
        self._schedule("way", (stages,), ("input",), (1.0,)).write(_folder(folder))
        self._declare(folder)
        values = np.zeros((self.target.batch_size, max(1, num_bytes // 4 // self.target.batch_size)), np.float32)
        inputs = write_inputs(folder / "inputs.npz", [values])
        with Worker.of(self.target) as worker:
            worker.load(folder)
            alone = worker.warm_up(inputs, calls=50, seconds=0.1)
            if not self.throughput:
                return alone
            return float(np.mean(worker.time(inputs, settle=8, calls=200, stream=True).seconds))

    def plans(self) -> list[Plan]:
        """Every plan that makes sense, the whole model on single devices first."""
        singles = [self._single(number) for number, it in enumerate(self.whole.seconds[0]) if it < INFINITE]
        return [*singles, *self._divisions(), *self._copies()]

    def _single(self, device: int) -> Plan:
        name = self.devices[device].name
        return self._plan(
            name, [(self._stages(self.whole, ("output",), (self.graph.signature.names,), (device,)))], [0]
        )

    def _stages(
        self, parts: _Parts, writes: Sequence[str], reads: Sequence[tuple[str, ...]], assignment: Assignment
    ) -> tuple[tuple[Stage, ...], _Parts, Assignment]:
        stages = tuple(
            Stage(
                writes=writes[number],
                reads=reads[number],
                device=device,
                folders=parts.places(number),
                layers=parts.layers[number],
            )
            for number, device in enumerate(assignment)
        )
        return stages, parts, assignment

    def _copies(self) -> list[Plan]:
        """A copy of the model on each device, which answers more requests and none of them faster."""
        able = [number for number, it in enumerate(self.whole.seconds[0]) if it < INFINITE]
        if not self.throughput or len(able) < 2:
            return []
        names = self.graph.signature.names
        routes = [self._stages(self.whole, ("output",), (names,), (device,)) for device in able]
        seconds = [self.whole.seconds[0][device] for device in able]
        return [self._plan(f"copies on {', '.join(self.devices[it].name for it in able)}", routes, able, seconds)]

    def _divisions(self) -> list[Plan]:
        if sum(device.takes_parts for device in self.devices) < 2 or len(self.divided.segments) < 2:
            return []
        work = self.work(self.divided, self.parts)
        wanted = {"for throughput": most_throughput(work)} if self.throughput else {}
        wanted["for latency"] = lowest_latency(work)
        plans = {}
        for purpose, assignment in wanted.items():
            if len(set(assignment)) > 1 and assignment not in plans:
                plans[assignment] = self._division(purpose, assignment)
        return list(plans.values())

    def _division(self, purpose: str, assignment: Assignment) -> Plan:
        """Neighbours on one device are compiled as one, which engines fuse, and timed again; then the bounds between
        devices are moved by a segment for as long as that is better."""
        best, moved = self._joined(assignment), True
        for _ in range(MOVES):
            options = [self._joined(other) for other in _moved(best.assignment)] if moved else []
            better = min(options, key=lambda it: it.seconds, default=best)
            moved = better.seconds < best.seconds
            best = better if moved else best
        work, divided = best.work, best.divided
        writes, reads = [it.writes for it in divided.segments], [it.reads for it in divided.segments]
        route = self._stages(best.parts, writes, reads, best.devices)
        in_flight = self.node["in_flight"] * len(set(best.devices))
        requests = DRAWN.stop if self.throughput else 1
        bars = timetable(work, best.devices, requests, in_flight)
        return self._plan(f"split {purpose}", [route], [0], [best.seconds], tuple(bars))

    def _joined(self, assignment: Assignment) -> _Division:
        divided = self.divided.merged(assignment)
        device_of = {segment.writes: device for segment, device in zip(self.divided.segments, assignment, strict=True)}
        devices = tuple(device_of[segment.writes] for segment in divided.segments)
        parts = self._parts(divided)
        work = self.work(divided, parts)
        seconds = period(work, devices) if self.throughput else makespan(work, devices) + self._entry_seconds
        return _Division(
            assignment=assignment, divided=divided, devices=devices, parts=parts, work=work, seconds=seconds
        )

    @cached_property
    def _entry_seconds(self) -> float:
        """Of the way of a request to the first device and back."""
        return min(self._way_seconds((device,), SIZES[0]) for device in range(len(self.devices)))

    def _plan(
        self,
        name: str,
        routes: Sequence[tuple[tuple[Stage, ...], _Parts, Assignment]],
        order: Sequence[int],
        seconds: Sequence[float] | None = None,
        bars: tuple[Entry, ...] = (),
    ) -> Plan:
        """Writes a schedule with all that its stages need into a folder of its own."""
        folder = _folder(self.scratch / "plans" / name.replace(" ", "-").replace(",", ""))
        for stages, parts, _ in routes:
            for stage in stages:
                for place in set(stage.folders.values()):
                    shutil.copytree(parts.folder / place, folder / place, dirs_exist_ok=True)
        times = list(seconds or [parts.seconds[0][devices[0]] for _, parts, devices in routes])
        schedule = self._schedule(name, tuple(it for it, _, _ in routes), self.graph.signature.names, tuple(times))
        schedule.write(folder)
        self._declare(folder)
        if len(routes) > 1:
            bars = tuple(_spread(times, order, DRAWN.stop))
        used = dict.fromkeys(self.devices[stage.device].name for stages, _, _ in routes for stage in stages)
        return Plan(
            name=name,
            folder=folder,
            devices=tuple(used),
            seconds=1 / sum(1 / it for it in times),
            stages=tuple(stage.writes for stage in routes[0][0]),
            bars=bars,
        )

    def _schedule(
        self, plan: str, routes: tuple[tuple[Stage, ...], ...], inputs: tuple[str, ...], seconds: tuple[float, ...]
    ) -> Schedule:
        return Schedule(plan=plan, devices=self.node["between"], inputs=inputs, routes=routes, seconds=seconds)

    def _declare(self, folder: Path) -> None:
        (folder / ENGINE_FILE).write_text(json.dumps(dict(self.node)))

    def figures(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        names = [device.name for device in self.devices]
        divided = self.divided if "parts" in self.__dict__ else None
        return {
            "optimize": self.node["optimize"],
            "batch_size": self.target.batch_size,
            "devices": names,
            "segments": [
                {
                    "writes": segment.writes,
                    "reads": list(segment.reads),
                    "share": segment.share,
                    "bytes": segment.row_bytes * self.target.batch_size,
                    "seconds": {
                        name: it for name, it in zip(names, self.parts.seconds[number], strict=True) if it < INFINITE
                    },
                }
                for number, segment in enumerate(divided.segments if divided else ())
            ],
            "ways": [
                {"from": names[one], "to": names[other], "seconds": way.fixed, "seconds_per_mb": 1e6 * way.per_byte}
                for (one, other), way in (self.ways if divided else {}).items()
            ],
        }

    def chart(self, plan: Plan) -> dict[str, Any]:
        """The Gantt chart of a plan, predicted and as it was run: bars of request, stage, device, start and end in
        seconds."""
        requests = DRAWN if self.throughput else range(1)
        predicted = [
            (bar.request, plan.stages[bar.part], self.devices[bar.device].name, bar.start, bar.end) for bar in plan.bars
        ]
        with latency.measuring_alone(), Worker.of(self.target) as worker:
            worker.load(plan.folder)
            batch = [values[np.arange(self.target.batch_size) % len(values)] for values in self.rows]
            inputs = write_inputs(self.scratch / "request.npz", batch)
            worker.warm_up(inputs, calls=CALLS, seconds=SECONDS)
            traced = worker.trace(inputs, requests=2 * DRAWN.stop if self.throughput else 1)
        first = min(request for request, *_ in traced)
        run = [
            (request - first, stage, self.devices[device].name, 1e-9 * start, 1e-9 * end)
            for request, stage, device, start, end in traced
        ]
        return {
            "plan": plan.name,
            "predicted": _from_zero([bar for bar in predicted if bar[0] in requests]),
            "measured": _from_zero([bar for bar in run if bar[0] in requests]),
        }


def _from_zero(bars: Sequence[tuple[int, str, str, float, float]]) -> list[list[Any]]:
    zero = min(start for *_, start, _ in bars)
    return [[request, stage, device, start - zero, end - zero] for request, stage, device, start, end in sorted(bars)]


def _spread(seconds: Sequence[float], order: Sequence[int], requests: int) -> Iterator[Entry]:
    """Requests over copies, each to the one that would have finished it first."""
    free = [0.0] * len(seconds)
    for request in range(requests):
        copy = min(range(len(seconds)), key=lambda it: free[it] + seconds[it])
        yield Entry(request, 0, order[copy], free[copy], free[copy] + seconds[copy])
        free[copy] += seconds[copy]


@dataclass(frozen=True, kw_only=True)
class _Way:
    """From one device to another: so many seconds, and more for every byte."""

    fixed: float
    per_byte: float

    @classmethod
    def through(cls, seconds: Sequence[float]) -> _Way:
        """The line through the times of the two `SIZES`."""
        small, large = seconds
        per_byte = max(0.0, large - small) / (SIZES[1] - SIZES[0])
        return cls(fixed=max(0.0, small - per_byte * SIZES[0]), per_byte=per_byte)

    def seconds(self, num_bytes: float) -> float:
        return self.fixed + self.per_byte * num_bytes


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Graphs, compiled for the devices and timed there.

    Attributes:
        compiled: [part] device -> folder below `folder`; devices with the same engine share one.
        seconds: [part][device] of one request; infinite where the device can't run the part.
        layers: convolutions and linear layers of each part.
    """

    folder: Path
    compiled: tuple[Mapping[int, str], ...]
    seconds: tuple[tuple[float, ...], ...]
    layers: tuple[int, ...]

    def places(self, part: int) -> Mapping[int, str]:
        return self.compiled[part]

    def only(self, part: int) -> _Parts:
        row = slice(part, part + 1)
        return replace(self, compiled=self.compiled[row], seconds=self.seconds[row], layers=self.layers[row])

    @classmethod
    def together(cls, parts: Sequence[_Parts]) -> _Parts:
        """All of them; they share a folder."""
        return cls(
            folder=parts[0].folder,
            compiled=tuple(it for each in parts for it in each.compiled),
            seconds=tuple(it for each in parts for it in each.seconds),
            layers=tuple(it for each in parts for it in each.layers),
        )


@dataclass(frozen=True, kw_only=True)
class _Division:
    """The parts that an assignment of the segments gives, and what they take.

    Attributes:
        devices: of the parts.
        seconds: of a request, or from one to the next.
    """

    assignment: Assignment
    divided: Divided
    devices: Assignment
    parts: _Parts
    work: Work
    seconds: float


def _moved(assignment: Assignment) -> list[Assignment]:
    """The assignments in which one bound between two devices lies a segment earlier or later."""
    found = []
    for place, (one, other) in enumerate(pairwise(assignment)):
        if one != other:
            found.append((*assignment[:place], other, *assignment[place + 1 :]))
            found.append((*assignment[: place + 1], one, *assignment[place + 2 :]))
    return [it for it in dict.fromkeys(found) if len(set(it)) == len(set(assignment))]


def _name(segment: Segment) -> str:
    """Of a folder for it: what it writes is not enough, since others may write the same."""
    return digest([segment.writes, list(segment.nodes)])[:12]


def _compiled(
    graph: Graph, name: str, takers: Sequence[bool], devices: Sequence[_Device], folder: Path
) -> dict[int, str]:
    """Device -> folder, for those whose engine took the graph."""
    found: dict[int, str] = {}
    for place, device in enumerate(devices):
        if not takers[place]:
            continue
        same = next((it for it in found if devices[it].node == device.node), None)
        if same is not None:
            found[place] = found[same]
            continue
        where = f"{SEGMENTS}/{name}/{device.name}"
        try:
            with Worker(threads=len(device.cpus)) as worker:
                worker.compile(device.node, graph, _folder(folder / where))
        except EngineError as error:
            log.warning("device %s can't run %s: %s", device.name, name, " ".join(str(error).split()))
            continue
        found[place] = where
    return found


def _timed(device: _Device, places: Sequence[str | None], inputs: Sequence[Path], folder: Path) -> list[float]:
    """Seconds of a request of each part, on the device's CPUs."""
    seconds = []
    with Worker(threads=len(device.cpus), cpus=device.cpus) as worker:
        for place, request in zip(places, inputs, strict=True):
            if place is None:
                seconds.append(INFINITE)
                continue
            worker.load(folder / place)
            seconds.append(worker.warm_up(request, calls=CALLS, seconds=SECONDS))
    return seconds


def _request(graph: Graph, batch_size: int, file: Path) -> Path:
    """A request of that many rows out of the reference."""
    reference = load_file(graph.reference)
    rows = (reference[f"inputs.{name}"] for name in graph.signature.names)
    _folder(file.parent)
    return write_inputs(file, (values[np.arange(batch_size) % len(values)] for values in rows))


def _num_layers(graph: Graph) -> int:
    nodes = onnx.load(graph.onnx, load_external_data=False).graph.node
    return sum(kind(node.op_type) in ("convolution", "linear") for node in nodes)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
