"""Names the bottleneck of a training step: how much of it waits, moves, calculates and is lost between operators.

The split, of the mean step on the training's own clock:

- Waiting for the batch is `data`, moving it to the device is `transfer`.
- Waiting for what other processes tell is `communication`, as long as under the profiler, in whichever phase it lies.
  What is told while the training calculates costs nothing. All below is about what is left of the phases.
- A profiler slows down what it watches, and what it slows down is the launching of operators, not their work. So the
  time of each kind of operators under the profiler, less what so many of them take there with nothing to do, is taken
  for their work, in milliseconds as they are; what exceeds the clock's time of its phase is scaled down to that.
- Of operators whose work the roofline allows in less time than launching them takes, what goes beyond is no work
  either: threads that wait for one another, and kernels that are set up. The smaller the work is beside the launch, the
  more of the excess is overhead.
- The rest of the passes and of the update is `overhead` too, launching many operators and Python, but no more of it
  than there was under the profiler, which only adds to it: where the steps of the clock were slower, the work was. So
  is what lies between the phases.
- Processes that load batches work beside the training. Where they take the processors from it, whatever it does takes
  longer by that: this is `data` too.
- The work of a kind is arithmetic (`compute`) or memory traffic (`memory`), in the proportion of the roofline's times
  of its operators that either roof bounds (Williams, Waterman and Patterson, CACM 2009). However far from the roofline
  it runs, more of the same would take longer.
- Memory that is touched for the first time has to be mapped by the system. That time is `memory` too, whatever kind of
  operators waits for it; it is laid on them in proportion to the bytes that they move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import MeasurementError
from hasten.core.interfaces import StepFigures, StepOperators, StepWork
from hasten.core.trial import PHASES, Collective, OperatorGroup, StepProfile
from hasten.profiling.bottleneck import REACHABLE
from hasten.profiling.roofline import Roofs
from hasten.profiling.told import told_size, told_time

WORTH_TELLING = 0.005
"""Share of a step from which on there is a sentence about a class."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """All operators of one kind in one phase, in milliseconds of a step.

    Attributes:
        work_ms: what they take beyond being launched, as far as it is work.
        launch_ms: the rest of their time.
        faults_ms: the part of `work_ms` that waits for fresh memory.
        compute_ms, memory_ms: what the roofline allows, of the operators that arithmetic or bytes bound.
    """

    phase: str
    name: str
    calls: float
    work_ms: float
    launch_ms: float
    flops: int
    num_bytes: int
    compute_ms: float
    memory_ms: float
    faults_ms: float = 0.0

    @property
    def milliseconds(self) -> float:
        return self.work_ms + self.launch_ms

    @property
    def bound(self) -> str:
        return "compute" if self.compute_ms > self.memory_ms else "memory"

    @property
    def shares(self) -> Mapping[str, float]:
        """Milliseconds of `compute` and of `memory`."""
        roofs_ms = self.compute_ms + self.memory_ms
        arithmetic = (self.work_ms - self.faults_ms) * (self.compute_ms / roofs_ms if roofs_ms > 0 else 0.0)
        return {"compute": arithmetic, "memory": self.work_ms - arithmetic}


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Where a step goes.

    Attributes:
        phases_ms: without what they wait for other processes.
        waiting_ms: phase -> that.
        python_ms: between the operators of the passes and of the update.
        delay_ms: that the loader's processes took from the step while it calculated, a part of all its other times.
    """

    phases_ms: Mapping[str, float]
    waiting_ms: Mapping[str, float]
    kinds: tuple[_Kind, ...]
    python_ms: float
    delay_ms: float
    num_faults: float
    activation_bytes: int
    collectives: tuple[Collective, ...]

    @property
    def step_ms(self) -> float:
        return sum(self.phases_ms.values()) + self.communication_ms

    @property
    def communication_ms(self) -> float:
        return sum(self.waiting_ms.values())

    @property
    def calls(self) -> float:
        return sum(kind.calls for kind in self.kinds)

    @property
    def launch_ms(self) -> float:
        return sum(kind.launch_ms for kind in self.kinds)

    @property
    def faults_ms(self) -> float:
        return sum(kind.faults_ms for kind in self.kinds)

    def shares(self) -> dict[str, float]:
        waiting = {name: self.phases_ms[name] for name in ("data", "transfer")}
        working = {
            "compute": sum(kind.shares["compute"] for kind in self.kinds),
            "memory": sum(kind.shares["memory"] for kind in self.kinds),
            "overhead": self.launch_ms + self.python_ms + self.phases_ms["other"],
        }
        delayed = self.delay_ms / sum(working.values()) if self.delay_ms else 0.0
        parts = {**waiting, **{name: part * (1 - delayed) for name, part in working.items()}}
        parts["data"] += self.delay_ms
        if self.collectives:
            parts["communication"] = self.communication_ms
        return {name: part / self.step_ms for name, part in parts.items()}

    def largest(self, bottleneck: str) -> _Kind | None:
        """The kind in which most of the time of compute or memory is."""
        bound = [kind for kind in self.kinds if kind.bound == bottleneck and kind.num_bytes]
        return max(bound, key=lambda kind: kind.shares[bottleneck], default=None)


def profile_step(
    *,
    phases_ms: NDArray[np.float64],
    page_faults: NDArray[np.int64],
    figures: StepFigures,
    roofline: Mapping[str, Any],
    delays_ms: NDArray[np.float64] | None = None,
    memory_bytes: int = 0,
    memory_limit_bytes: int | None = None,
) -> StepProfile:
    """Splits a training step and names the bottleneck.

    Args:
        phases_ms: (S, 6) milliseconds of each of `PHASES` in steps that nothing disturbed.
        page_faults: (S,) pages that were touched for the first time, in the same steps.
        figures: of the operators, measured in other steps of the same training.
        roofline: JSON form of what the probe measured with the training's threads.
        delays_ms: (S,) of the same steps, how long each was ready and others had the processors; None where no process
            loads batches, so that it was by none of the training's own doing.
        memory_bytes: peak of the training process and its workers.
        memory_limit_bytes: on them; None for none.

    Returns:
        Shares of data, transfer, compute, memory, overhead and, of several processes, communication, which sum to 1,
        and where the limit is broken also of capacity: the share of the bytes that has to go.

    Raises:
        MeasurementError: there is no step, or no operator of one.
    """
    if len(phases_ms) == 0 or not phases_ms.sum() > 0:
        raise MeasurementError("a training step can't be profiled without the time of at least one")
    if not figures.operators:
        raise MeasurementError("the profiler saw no operators, so that a training step can't be split")
    mean_ms = dict(zip(PHASES, phases_ms.mean(axis=0).tolist(), strict=True))
    split = _split(
        mean_ms,
        float(page_faults.mean()),
        0.0 if delays_ms is None else float(delays_ms.mean()),
        figures,
        Roofs.from_dict(roofline),
    )
    shares = split.shares()
    told = sorted((name for name in shares if shares[name] >= WORTH_TELLING), key=lambda name: -shares[name])
    evidence = [_EVIDENCE[name](split, shares[name]) for name in told]
    bottleneck = max(shares, key=lambda name: shares[name])
    if memory_limit_bytes is not None and memory_bytes > memory_limit_bytes:
        bottleneck, shares["capacity"] = "capacity", 1 - memory_limit_bytes / memory_bytes
        evidence.insert(0, _capacity(memory_bytes, memory_limit_bytes, split))
    return StepProfile(
        step_ms=split.step_ms,
        phases_ms=mean_ms,
        shares=shares,
        bottleneck=bottleneck,
        evidence=tuple(evidence),
        operators=tuple(_group(kind, split.step_ms) for kind in split.kinds),
        collectives=split.collectives,
        waiting_ms=split.waiting_ms,
    )


def _split(
    whole_ms: Mapping[str, float], num_faults: float, delay_ms: float, figures: StepFigures, roofs: Roofs
) -> _Split:
    waiting_ms = {name: min(figures.waiting_ms.get(name, 0.0), time_ms) for name, time_ms in whole_ms.items()}
    phases_ms = {name: time_ms - waiting_ms[name] for name, time_ms in whole_ms.items()}
    kinds: list[_Kind] = []
    python_ms = 0.0
    for phase in figures.watched_ms:
        found = _kinds(phase, figures, roofs)
        lost_ms = _lost_ms(phase, found, figures)
        found = _scaled(found, phases_ms[phase], lost_ms)
        rest_ms = max(0.0, phases_ms[phase] - sum(kind.work_ms for kind in found))
        # Launching and Python are told apart as under the profiler, which slows both.
        launched = [rest_ms * (kind.launch_ms / lost_ms) if lost_ms > 0 else 0.0 for kind in found]
        kinds += [replace(kind, launch_ms=launch_ms) for kind, launch_ms in zip(found, launched, strict=True)]
        python_ms += rest_ms - sum(launched)
    kinds = _with_faults(kinds, num_faults * figures.page_fault_us / 1e3)
    kinds.sort(key=lambda kind: -kind.milliseconds)
    return _Split(
        phases_ms=phases_ms,
        waiting_ms=waiting_ms if figures.collectives else {},
        kinds=tuple(kinds),
        python_ms=python_ms,
        delay_ms=min(delay_ms, sum(phases_ms.values()) - phases_ms["data"] - phases_ms["transfer"]),
        num_faults=num_faults,
        activation_bytes=figures.activation_bytes,
        collectives=figures.collectives,
    )


def _lost_ms(phase: str, found: Sequence[_Kind], figures: StepFigures) -> float:
    """What a phase took under the profiler besides the work of its operators and waiting for other processes."""
    inside_ms = sum(each.milliseconds for each in figures.operators if each.phase == phase)
    calculating_ms = figures.watched_ms[phase] - figures.waiting_ms.get(phase, 0.0)
    return max(0.0, calculating_ms - inside_ms) + sum(kind.launch_ms for kind in found)


def _kinds(phase: str, figures: StepFigures, roofs: Roofs) -> list[_Kind]:
    """Of one phase, in milliseconds as the profiler has them."""
    kinds = []
    for each in figures.operators:
        if each.phase != phase:
            continue
        works = _works(phase, each.kind, figures)
        times = [(_compute_ms(work, roofs), _memory_ms(work, roofs)) for work in works]
        work_ms = _work_ms(each, sum(map(max, times)) if works else None)
        kinds.append(
            _Kind(
                phase=phase,
                name=each.kind,
                calls=each.calls,
                work_ms=work_ms,
                launch_ms=each.milliseconds - work_ms,
                flops=sum(work.flops for work in works),
                num_bytes=sum(work.num_bytes for work in works),
                compute_ms=sum(compute for compute, memory in times if compute > memory),
                memory_ms=sum(memory for compute, memory in times if compute <= memory),
            )
        )
    return kinds


def _work_ms(each: StepOperators, roof_ms: float | None) -> float:
    """What operators take beyond being launched, as far as it is work; None where nothing is known of that."""
    busy_ms = max(0.0, each.milliseconds - each.idle_ms)
    if roof_ms is None or roof_ms >= each.idle_ms:
        return busy_ms
    return max(min(busy_ms, roof_ms / REACHABLE), busy_ms * roof_ms / each.idle_ms)


def _scaled(kinds: Sequence[_Kind], phase_ms: float, lost_ms: float) -> list[_Kind]:
    """The same with work that takes no longer than the phase, and no less than what could not be lost in it."""
    work_ms = sum(kind.work_ms for kind in kinds)
    working_ms = min(max(work_ms, phase_ms - lost_ms), phase_ms)
    return [replace(kind, work_ms=working_ms * (kind.work_ms / work_ms) if work_ms > 0 else 0.0) for kind in kinds]


def _works(phase: str, kind: str, figures: StepFigures) -> list[StepWork]:
    """What a kind of operators has to do; a compiler's own kernels do what no operators were seen for."""
    seen = {each.kind for each in figures.operators if each.phase == phase}
    wanted = (kind,) if kind != "fused" else {work.kind for work in figures.work} - seen
    return [work for work in figures.work if work.phase == phase and work.kind in wanted]


def _compute_ms(work: StepWork, roofs: Roofs) -> float:
    return roofs.compute_ms(work.flops, 0.0, work.precision)


def _memory_ms(work: StepWork, roofs: Roofs) -> float:
    return roofs.memory_ms(work.num_bytes, work.num_bytes / work.calls)


def _with_faults(kinds: list[_Kind], faults_ms: float) -> list[_Kind]:
    """The same with the time that each waits for fresh memory, at most all of its work."""
    total_bytes = sum(kind.num_bytes for kind in kinds)
    if not total_bytes:
        return kinds
    return [replace(kind, faults_ms=min(kind.work_ms, faults_ms * kind.num_bytes / total_bytes)) for kind in kinds]


def _group(kind: _Kind, step_ms: float) -> OperatorGroup:
    return OperatorGroup(
        kind=f"{kind.name} {kind.phase}" if kind.name != kind.phase else kind.name,
        calls=round(kind.calls),
        milliseconds=kind.milliseconds,
        share=kind.milliseconds / step_ms,
        flops=kind.flops,
        num_bytes=kind.num_bytes,
        bound=kind.bound,
        roof_ms=kind.compute_ms + kind.memory_ms,
    )


def _data(split: _Split, share: float) -> str:
    said = f"{share:.0%} of a step waits for the next batch ({_of(split.phases_ms['data'] + split.delay_ms, split)})"
    if split.delay_ms < WORTH_TELLING * split.step_ms:
        return said
    return f"{said}: {told_time(split.delay_ms)} of it for a processor, while others load batches"


def _transfer(split: _Split, share: float) -> str:
    return f"{share:.0%} of a step moves the batch to the device ({_of(split.phases_ms['transfer'], split)})"


def _compute(split: _Split, share: float) -> str:
    said = f"{share:.0%} of a step is arithmetic ({_of(share * split.step_ms, split)})"
    if (first := split.largest("compute")) is None:
        return said
    return (
        f"{said}: {_named(first)} takes {told_time(first.milliseconds)} for {first.flops / 1e6:.3g} MFLOP, where "
        f"the roofline allows {told_time(first.compute_ms + first.memory_ms)}"
    )


def _memory(split: _Split, share: float) -> str:
    parts = []
    if (first := split.largest("memory")) is not None:
        parts.append(
            f"{_named(first)} takes {told_time(first.milliseconds)} to move {told_size(first.num_bytes)}, where the "
            f"bandwidth allows {told_time(first.compute_ms + first.memory_ms)}"
        )
    if split.faults_ms >= WORTH_TELLING * split.step_ms:
        parts.append(f"{split.num_faults:.0f} pages of fresh memory take {told_time(split.faults_ms)}")
    if split.activation_bytes > 0:
        parts.append(f"{told_size(split.activation_bytes)} of activations are kept for the backward pass")
    return f"{share:.0%} of a step is memory traffic ({_of(share * split.step_ms, split)}): {', '.join(parts)}"


def _overhead(split: _Split, share: float) -> str:
    each_us = split.launch_ms / split.calls * 1e3 if split.calls else 0.0
    parts = [
        f"{split.calls:.0f} operator calls of {each_us:.3g} us each beside their work",
        f"{told_time(split.python_ms)} of Python between them",
        f"{told_time(split.phases_ms['other'])} between the phases",
    ]
    return f"{share:.0%} of a step is overhead ({_of(share * split.step_ms, split)}): {', '.join(parts)}"


def _communication(split: _Split, share: float) -> str:
    parts = [
        f"{each.kind} moves {told_size(each.num_bytes)} a step in {told_time(each.milliseconds)}, "
        f"{each.hidden:.0%} of it beside calculation"
        for each in split.collectives
        if each.milliseconds >= WORTH_TELLING * split.step_ms
    ]
    said = f"{share:.0%} of a step waits for other processes ({_of(share * split.step_ms, split)})"
    return f"{said}: {', '.join(parts)}" if parts else said


_EVIDENCE = {
    "data": _data,
    "transfer": _transfer,
    "compute": _compute,
    "memory": _memory,
    "overhead": _overhead,
    "communication": _communication,
}


def _capacity(memory_bytes: int, limit_bytes: int, split: _Split) -> str:
    above = memory_bytes / limit_bytes - 1
    return (
        f"the training takes {told_size(memory_bytes)}, {above:.0%} above the limit of {told_size(limit_bytes)}; "
        f"{told_size(split.activation_bytes)} are activations kept for the backward pass"
    )


def _named(kind: _Kind) -> str:
    return kind.name if kind.name == kind.phase else f"{kind.name} in the {kind.phase} pass"


def _of(milliseconds: float, split: _Split) -> str:
    return f"{told_time(milliseconds)} of {told_time(split.step_ms)}"
