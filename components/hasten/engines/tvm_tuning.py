"""Measured search for the schedules of a module's kernels, with TVM's MetaSchedule.

Samples are built and timed in this process: TVM's own builder starts a process for each, which takes 20 s to import
what it needs. Schedules are sampled at random ("replay-trace"), since a search that learns spends more on its model
than on measurements in a budget of minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

_SAMPLES = 4
"""Schedules drawn at once for a kernel."""
_REPEAT_MS, _REPEATS = 2, 3


@dataclass(kw_only=True)
class _Task:
    """One kernel of the module, which calls it `weight` times."""

    module: Any
    weight: int
    naive_seconds: float
    seconds: float
    draw: Callable[[], Sequence[Any]]
    samples: list[Any] = field(default_factory=list)
    num_trials: int = 0

    @property
    def urgency(self) -> float:
        """Gives each kernel trials in proportion to its share of the time (the divisor method of Jefferson)."""
        return self.weight * self.seconds / (self.num_trials + 1)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search has found.

    Attributes:
        database: of MetaSchedule, with the fastest schedules.
        num_kernels: of which a faster schedule than the naive one was found.
        naive_ms: sum over the kernels that were timed, each as often as it is called.
        tuned_ms: the same with the fastest schedules.
    """

    database: Any
    num_kernels: int
    num_trials: int
    naive_ms: float
    tuned_ms: float
    seconds: float

    @property
    def note(self) -> str:
        return (
            f"tvm tuned {self.num_kernels} kernels in {self.num_trials} trials and {self.seconds:.0f} s: "
            f"{self.tuned_ms:.2f} ms where they took {self.naive_ms:.2f} ms untuned"
        )


def tune(module: Any, target: Any, seconds: float) -> Tuned:
    """Searches for faster schedules until the time is up, which ends with the trial that is running.

    Args:
        module: of relax, legalized and fused.
    """
    from tvm.s_tir import meta_schedule

    start = time.monotonic()
    database, tasks, num_trials = meta_schedule.database.MemoryDatabase(), [], 0
    end = start + seconds
    for found in meta_schedule.relax_integration.extract_tasks(module, target):
        if time.monotonic() > end:
            break
        tasks.append(_task(found, target))
    waiting = list(tasks)
    while waiting and time.monotonic() < end:
        task = max(waiting, key=lambda each: each.urgency)
        task.samples = task.samples or list(task.draw())
        if not task.samples:
            waiting.remove(task)
            continue
        _try(task, task.samples.pop(), database, target)
        num_trials += 1
    return Tuned(
        database=database,
        num_kernels=sum(task.seconds < task.naive_seconds for task in tasks),
        num_trials=num_trials,
        naive_ms=sum(task.weight * task.naive_seconds for task in tasks) * 1000,
        tuned_ms=sum(task.weight * task.seconds for task in tasks) * 1000,
        seconds=time.monotonic() - start,
    )


def _task(found: Any, target: Any) -> _Task:
    """The kernel with the time of its naive schedule."""
    from tvm.s_tir import meta_schedule

    module = found.dispatched[0]
    arguments = meta_schedule.arg_info.ArgInfo.from_entry_func(module, remove_preproc=True)
    naive = _seconds(module, arguments, target)
    return _Task(
        module=module, weight=int(found.weight), naive_seconds=naive, seconds=naive, draw=_drawing(module, target)
    )


def _drawing(module: Any, target: Any) -> Callable[[], Sequence[Any]]:
    """A function that draws schedules out of the space of a CPU."""
    from tvm.s_tir import meta_schedule

    with _without_tensor_instructions():
        context = meta_schedule.TuneContext(
            module,
            target=target,
            space_generator=_space(),
            search_strategy="replay-trace",
            rand_state=1,
            num_threads=1,
        )
    context.pre_tuning(_SAMPLES, _SAMPLES, context.generate_design_space())
    return lambda: context.generate_measure_candidates() or ()


def _space() -> Any:
    """MetaSchedule's space for processors, without the schedules for integers."""
    from tvm.s_tir.meta_schedule import postproc, schedule_rule
    from tvm.s_tir.meta_schedule.space_generator import PostOrderApply

    return PostOrderApply(
        sch_rules=[
            schedule_rule.AutoInline(
                into_producer=False,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=True,
                require_injective=True,
                require_ordered=True,
                disallow_op=["tirx.exp"],
            ),
            schedule_rule.AddRFactor(max_jobs_per_core=16, max_innermost_factor=64),
            schedule_rule.MultiLevelTiling(
                structure="SSRSRS",
                max_innermost_factor=64,
                reuse_write=schedule_rule.ReuseType(req="may", levels=[1, 2], scope="global"),
            ),
            schedule_rule.ParallelizeVectorizeUnroll(
                max_jobs_per_core=16, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512], unroll_explicit=True
            ),
            schedule_rule.RandomComputeLocation(),
        ],
        postprocs=[
            postproc.DisallowDynamicLoop(),
            postproc.RewriteParallelVectorizeUnroll(),
            postproc.RewriteReductionBlock(),
        ],
        mutator_probs={},
    )


def _try(task: _Task, sample: Any, database: Any, target: Any) -> None:
    from tvm.s_tir.meta_schedule.database import TuningRecord

    task.num_trials += 1
    try:
        seconds = _seconds(sample.sch.mod, sample.args_info, target)
    except Exception:  # of whatever kind: the space holds schedules that the code generator refuses
        return
    if seconds < task.seconds:
        task.seconds = seconds
        workload = database.commit_workload(task.module)
        database.commit_tuning_record(TuningRecord(sample.sch.trace, workload, [seconds], target, sample.args_info))


def _seconds(module: Any, arguments: Sequence[Any], target: Any) -> float:
    """Of one call, the fastest of a few."""
    import tvm
    from tvm.driver import build

    rows = [_random([int(size) for size in each.shape], str(each.dtype)) for each in arguments]
    timer = build(module, target=target).time_evaluator(
        "main", tvm.cpu(), number=1, repeat=_REPEATS, min_repeat_ms=_REPEAT_MS
    )
    return float(min(timer(*map(tvm.runtime.tensor, rows)).results))


def _random(shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
    """Numbers that don't slow the processor down as denormal ones would; indices are 0, which is inside of anything."""
    if dtype.startswith("float"):
        return np.random.default_rng(0).uniform(0.5, 1.0, shape).astype(dtype)
    return np.zeros(shape, dtype)


@contextmanager
def _without_tensor_instructions() -> Iterator[None]:
    """Keeps TVM from importing its descriptions of tensor instructions, of GPUs for the most part, which takes 20 s and
    which the space here has no use for."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
