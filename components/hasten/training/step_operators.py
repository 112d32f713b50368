"""Which operators a training step spends its time in, and what they ask of the machine."""

from __future__ import annotations

import mmap
import os
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hasten.artefacts.operators import kind
from hasten.core.errors import MeasurementError
from hasten.core.interfaces import StepFigures, StepOperators, StepWork
from hasten.core.trial import PHASES
from hasten.distributed.group import Group
from hasten.training.step_clock import StepClock
from hasten.training.step_collectives import Communication, mean_of
from hasten.training.step_kinds import kind_of

CALCULATING = ("forward", "backward", "optimizer")
"""The phases that operators are told of."""

_IDLE_REPEATS = 20
_TOUCHED_BYTES, _TOUCHED_PIECES = 2**20, 21
_NO_ARITHMETIC = ("copy", "other")


class OperatorWatch(pl.Callback):  # type: ignore[misc]
    """Times the operators of some steps under PyTorch's profiler, and counts the work of one more step.

    Both make a step slower, so that the clock's times of these steps tell nothing: take those before `first`. The
    training's result stays the same.

    Args:
        clock: of the same training.
        first: step, counted from 0 by the clock, from which on operators are timed; those before are undisturbed.
        steps: whose operators are timed.
        group: of processes that train together, each of which watches the same steps; None where this one is alone.

    Attributes:
        figures: what was found, once `first + steps + 1` steps were made.
    """

    def __init__(self, clock: StepClock, *, first: int, steps: int = 3, group: Group | None = None) -> None:
        self._clock, self._first, self._steps, self._group = clock, first, steps, group
        self._profiler: profile | None = None
        self._watched: list[_Watched] = []
        self._work: _Work | None = None
        self._counting: ExitStack | None = None
        self._figures: StepFigures | None = None

    @property
    def done(self) -> bool:
        """Whether `figures` are there and further steps are undisturbed again."""
        return self._figures is not None

    @property
    def figures(self) -> StepFigures:
        """Raises MeasurementError where the training ended before they were measured."""
        if self._figures is None:
            raise MeasurementError(
                f"the operators of a training step are measured in steps {self._first + 1} to "
                f"{self._first + self._steps + 1}, and the training ended after {self._clock.num_updates}"
            )
        return self._figures

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if self.done or self._profiler is not None or self._counting is not None:
            return
        made = self._clock.num_updates - self._first
        if 0 <= made < self._steps:
            self._profiler = _profiler(pl_module.device, self._group)
            self._profiler.start()
            if self._group is not None:
                self._group.meet()  # who was slower to start it would be waited for within the step
            self._clock.name_ranges(True)
        elif made == self._steps:
            self._counting = ExitStack()
            self._work = _Work(self._clock, pl_module)
            self._counting.enter_context(torch.autograd.graph.saved_tensors_hooks(self._work.keep, lambda kept: kept))
            self._counting.enter_context(self._work)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *outputs: Any) -> None:
        made = self._clock.num_updates - self._first
        if self._profiler is not None and made > len(self._watched):
            self._clock.name_ranges(False)
            self._profiler.stop()
            self._watched.append(_Watched.of(self._profiler, pl_module.device, self._group))
            self._profiler = None
        elif self._counting is not None and self._work is not None and made > self._steps:
            self._counting.close()
            self._counting = None
            idle_us = _idle_us(pl_module.device, self._group)
            self._figures = _figures(self._watched, self._work, idle_us)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """Leaves nothing watched where a training ends within a step."""
        if self._profiler is not None:
            self._clock.name_ranges(False)
            self._profiler.stop()
            self._profiler = None
        if self._counting is not None:
            self._counting.close()
            self._counting = None


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """One traced step: (phase, kind) -> milliseconds and calls, milliseconds of each phase, what is told to others."""

    milliseconds: dict[tuple[str, str], float]
    calls: dict[tuple[str, str], int]
    phases_ms: dict[str, float]
    communication: Communication | None

    @classmethod
    def of(cls, profiler: profile, device: torch.device, group: Group | None) -> _Watched:
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        phases_ms: dict[str, float] = defaultdict(float)
        events = _events(profiler)
        for event in events:
            if event.name in CALCULATING:
                phases_ms[event.name] += event.cpu_time_total / 1e3
        for phase, name, own_ms in _operators(events, device.type == "cuda"):
            times[phase, "optimizer" if phase == "optimizer" else name].append(own_ms)
        return cls(
            milliseconds={key: sum(found) for key, found in times.items()},
            calls={key: len(found) for key, found in times.items()},
            phases_ms=dict(phases_ms),
            communication=None if group is None else Communication.of(profiler),
        )


def _events(profiler: profile) -> Sequence[Any]:
    events: Sequence[Any] | None = profiler.events()  # type: ignore[no-untyped-call]
    return events or ()


def _operators(events: Iterable[Any], on_device: bool) -> Iterator[tuple[str, str, float]]:
    """Phase, kind and milliseconds of each operator with all that is below it.

    Of a chain of operators that call one another the outermost with a known kind counts; what an operator of no known
    kind does itself is `other`. A graph that was compiled holds operators and kernels of its own, which are `fused`.
    """
    stack: list[tuple[Any, str | None]] = [(event, None) for event in events if event.cpu_parent is None]
    while stack:
        event, phase = stack.pop()
        phase = event.name if event.name in PHASES else phase
        if phase is None or (name := kind_of(event.name)) is None:
            stack += [(child, phase) for child in event.cpu_children]
        elif phase in CALCULATING:
            inside = [child for child in event.cpu_children if kind_of(child.name) is not None]
            whole = name not in ("other", "fused") or not inside
            total = event.device_time_total if on_device else event.cpu_time_total
            within = event.self_device_time_total if on_device else event.self_cpu_time_total
            yield phase, name, (total if whole else within) / 1e3
            stack += [] if whole else [(child, phase) for child in event.cpu_children]


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of a step, with their FLOPs by the formulas of `torch.utils.flop_counter` and their bytes.

    Under it, what `torch.compile` made runs as eager PyTorch.
    """

    def __init__(self, clock: StepClock, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
        self._kept: dict[int, int] = {}
        self._spent = False
        self.activation_bytes = 0
        self.found: dict[tuple[str, str, int, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        phase = self._clock.phase
        if phase in CALCULATING and func.namespace == "aten" and not _is_view(func):
            self._count(phase, func, args, kwargs or {}, outputs)
        return outputs

    def keep(self, tensor: Tensor) -> Tensor:
        """Hears of each tensor that a backward pass will need; several may lie in one piece of memory."""
        if self._spent:
            self._kept, self._spent = {}, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._kept[storage.data_ptr()] = storage.nbytes()
            self.activation_bytes = max(self.activation_bytes, sum(self._kept.values()))
        return tensor

    def _count(self, phase: str, func: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        self._spent = self._spent or phase == "backward"
        operator = "optimizer" if phase == "optimizer" else kind(str(func))
        given = _tensors((args, kwargs))
        num_bytes = sum(tensor.nbytes for tensor in {id(each): each for each in (*given, *_tensors(outputs))}.values())
        floats = [tensor.dtype for tensor in given if tensor.is_floating_point()]
        precision = str(floats[0]).removeprefix("torch.") if floats else "float32"
        found = self.found[phase, operator, num_bytes, precision]
        found[0] += 1
        found[1] += _flops(func, operator, args, kwargs, outputs)
        found[2] += num_bytes


def _flops(func: Any, operator: str, args: Any, kwargs: dict[str, Any], outputs: Any) -> int:
    """By PyTorch's formula where it has one, else 1 for each element that is written by what calculates."""
    if (formula := flop_registry.get(func._overloadpacket)) is not None:
        return int(formula(*args, **kwargs, out_val=outputs))
    return 0 if operator in _NO_ARITHMETIC else sum(tensor.numel() for tensor in _tensors(outputs))


def _is_view(func: Any) -> bool:
    """Whether nothing is moved: outputs share the memory of an input and do not write to it."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _figures(watched: Sequence[_Watched], work: _Work, idle_us: dict[tuple[str, str], float]) -> StepFigures:
    keys = sorted({key for step in watched for key in step.milliseconds})
    operators = []
    for phase, name in keys:
        calls = median(step.calls.get((phase, name), 0) for step in watched)
        idle = idle_us.get((phase, name), idle_us[phase, "elementwise"])
        operators.append(
            StepOperators(
                phase=phase,
                kind=name,
                milliseconds=median(step.milliseconds.get((phase, name), 0.0) for step in watched),
                calls=calls,
                idle_ms=calls * idle / 1e3,
            )
        )
    collectives, waiting_ms = mean_of([step.communication for step in watched if step.communication is not None])
    return StepFigures(
        operators=tuple(operators),
        work=tuple(
            StepWork(phase=phase, kind=name, calls=calls, flops=flops, num_bytes=num_bytes, precision=precision)
            for (phase, name, _, precision), (calls, flops, num_bytes) in work.found.items()
        ),
        watched_ms={phase: median(step.phases_ms.get(phase, 0.0) for step in watched) for phase in CALCULATING},
        page_fault_us=_page_fault_us(),
        activation_bytes=work.activation_bytes,
        collectives=collectives,
        waiting_ms=waiting_ms,
    )


def _profiler(device: torch.device, group: Group | None) -> profile:
    """Of several processes it also tells the shapes of tensors, by which it knows how much they tell one another."""
    # Kineto announces each profile on stderr. It reads its level when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    devices = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *devices], record_shapes=group is not None)


def _idle_us(device: torch.device, group: Group | None) -> dict[tuple[str, str], float]:
    """(Phase, kind) -> microseconds of an operator with next to nothing to do, as the profiler sees it.

    Of the update it is that of an elementwise operator, of which it consists where its kernels are not fused.
    """
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)]
        net = nn.Sequential(*layers).to(device)
    row = torch.ones(2, 1, 4, 4, device=device)
    for _ in range(3):
        net(row).sum().backward()
    with _profiler(device, group) as profiler:
        for _ in range(_IDLE_REPEATS):
            with record_function("forward"):
                loss = net(row).sum()
            with record_function("backward"):
                loss.backward()
            with record_function("optimizer"), torch.no_grad():
                row.mul_(1.0)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for phase, name, own_ms in _operators(_events(profiler), device.type == "cuda"):
        times[phase, "elementwise" if phase == "optimizer" else name].append(1e3 * own_ms)
    return {key: median(found) for key, found in times.items()}


def _page_fault_us() -> float:
    """Of a page that is touched for the first time, above touching it again: the median of several pieces of memory."""
    return median(_touched_us() for _ in range(_TOUCHED_PIECES))


def _touched_us() -> float:
    with mmap.mmap(-1, _TOUCHED_BYTES) as fresh:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first, again = (_seconds(lambda: _touch(fresh)) for _ in range(2))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return max(0.0, first - again) / max(faults, 1) * 1e6


def _touch(memory: mmap.mmap) -> None:
    for place in range(0, _TOUCHED_BYTES, mmap.PAGESIZE):
        memory[place] = 1


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start
