"""Where the time of a training step goes, by real timestamps at the borders of its phases."""

from __future__ import annotations

import resource
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter_ns

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.profilers import Profiler

from hasten.core.trial import PHASES

_DATA, _TRANSFER, _FORWARD, _BACKWARD, _OPTIMIZER, _OTHER = range(len(PHASES))


class StepClock(Profiler):  # type: ignore[misc]
    """Splits each step of a training into `PHASES`. A Trainer has it as its profiler and tells it of all it does.

    There is one mark a border, which ends a phase and begins the next, so that nothing is counted twice and the phases
    of a step add up to its time exactly. Within a phase another may lie, such as both passes within the optimizer's
    `step`, which calls them: that time is the inner one's alone.

    A step begins with the wait for its batch, and is over when the next wait begins after the weights were updated:
    with gradients that are accumulated, be it over several batches or over parts of one, it has several forward and
    backward passes. What happens between steps and between epochs (callbacks, schedules, checkpoints) is `other`
    of the step before. Making an epoch's iterator is `data`, but for the first, which is made before training starts.
    Of a resumed training the clock holds the steps of this process.

    Args:
        finish: returns when all that was asked of the device is done; called at each border, so that work which runs
            beside the process is counted in the phase that asked for it. Whatever overlapped does so no more: on a GPU
            the sum of the phases is what the step would take without any overlap.
        now: nanoseconds of a clock that never goes back.
    """

    def __init__(self, finish: Callable[[], object] | None = None, now: Callable[[], int] = perf_counter_ns) -> None:
        super().__init__()
        self._finish, self._now = finish, now
        self._steps, self._faults = array("q"), array("q")
        self._spent = [0] * len(PHASES)
        self._inside = [_OTHER]  # the last is the phase under way; the first what lies outside of them all
        self._last: int | None = None
        self._faults_before = 0
        self._updated = False
        self._ranges: list[torch.profiler.record_function] | None = None
        self._starts, self._stops = _Marks(self._on_start()), _Marks(self._on_stop())

    @property
    def num_steps(self) -> int:
        """Steps that are over."""
        return len(self._faults)

    @property
    def num_updates(self) -> int:
        """Updates of the weights: one more than `num_steps` where what follows an update is still under way."""
        return self.num_steps + self._updated

    @property
    def phase(self) -> str:
        """That is under way, one of `PHASES`."""
        return PHASES[self._inside[-1]]

    @property
    def phases_ms(self) -> NDArray[np.float64]:
        """(S, 6) milliseconds of each step that is over in each of `PHASES`."""
        return np.array(self._steps, np.float64).reshape(-1, len(PHASES)) / 1e6

    @property
    def page_faults(self) -> NDArray[np.int64]:
        """(S,) pages of memory that the system gave to this process within each step, without reading a disk."""
        return np.array(self._faults, np.int64)

    def name_ranges(self, wanted: bool) -> None:
        """Whether from now on each phase is a range in a trace of PyTorch's profiler, named as in `PHASES`."""
        self._ranges = [] if wanted else None

    def start(self, action_name: str) -> None:
        mark = self._starts[action_name]
        if mark is not None:
            mark()

    def stop(self, action_name: str) -> None:
        mark = self._stops[action_name]
        if mark is not None:
            mark()

    def describe(self) -> None:
        """Prints nothing: whoever lent the clock reads it."""

    def _on_start(self) -> Mapping[str, Callable[[], None]]:
        return {
            "run_training_epoch": self._open,
            "train_dataloader_next": self._await,
            "batch_to_device": partial(self._enter, _TRANSFER),
            "training_step": partial(self._enter, _FORWARD),
            # The hooks that lie next to the backward pass: those around it are not told of it in manual optimization.
            "[LightningModule]on_after_backward": self._leave,
            "optimizer_step": partial(self._enter, _OPTIMIZER),
            "on_train_end": self._end,
        }

    def _on_stop(self) -> Mapping[str, Callable[[], None]]:
        return {
            "train_dataloader_next": self._receive,
            "batch_to_device": self._leave,
            "training_step": self._leave,
            "[LightningModule]on_before_backward": partial(self._enter, _BACKWARD),
            "optimizer_step": self._update,
        }

    def _open(self) -> None:
        """An epoch begins: until its first batch is asked for, its iterator is made."""
        self._close()
        self._inside[0] = _DATA

    def _await(self) -> None:
        self._close()
        self._enter(_DATA)

    def _receive(self) -> None:
        self._leave()
        self._inside[0] = _OTHER

    def _enter(self, phase: int) -> None:
        self._mark()
        self._inside.append(phase)
        if self._ranges is not None:
            self._ranges.append(torch.profiler.record_function(PHASES[phase]))
            self._ranges[-1].__enter__()

    def _leave(self) -> None:
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        self._mark()
        self._inside.pop()

    def _update(self) -> None:
        self._leave()
        self._updated = True

    def _mark(self) -> int:
        """What has passed since the last mark belongs to the phase under way."""
        if self._finish is not None:
            self._finish()
        now = self._now()
        if self._last is not None:
            self._spent[self._inside[-1]] += now - self._last
        self._last = now
        return now

    def _close(self) -> None:
        """The step is over where it has changed the weights; where there was none, the first begins."""
        if self._last is None:
            self._mark()
            self._faults_before = _page_faults()
        elif self._updated:
            self._mark()
            self._steps.extend(self._spent)
            faults = _page_faults()
            self._faults.append(faults - self._faults_before)
            self._faults_before, self._updated = faults, False
            self._spent = [0] * len(PHASES)

    def _end(self) -> None:
        """Several callbacks hear of the end; the first of them closes the last step."""
        if self._updated:
            self._close()


class _Marks(dict[str, Callable[[], None] | None]):
    """What to do at an action of Lightning, looked up by its whole name, of which few are borders."""

    def __init__(self, by_hook: Mapping[str, Callable[[], None]]) -> None:
        super().__init__()
        self._by_hook = by_hook

    def __missing__(self, action: str) -> Callable[[], None] | None:
        hook = action.rpartition(".")[2]
        of_module = "[LightningModule]" + hook if action.startswith("[LightningModule]") else hook
        self[action] = self._by_hook.get(of_module, self._by_hook.get(hook))
        return self[action]


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
