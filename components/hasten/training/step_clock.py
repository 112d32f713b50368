"""Where the time of a training step goes, by real timestamps at the borders of its phases."""

from __future__ import annotations

import os
import resource
import weakref
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
    of a step add up to its time exactly. Lightning says when it fetches a batch and moves it, the `Learner` when it
    calculates.

    A step begins with the wait for its batch, and is over when the next wait begins after the weights were updated; it
    may have several forward and backward passes, one for each part of its rows. What happens between steps and between
    epochs (callbacks, schedules, checkpoints) is `other` of the step before. Making an epoch's iterator is `data`, but
    for the first, which is made before training starts. Of a resumed training the clock holds the steps of this
    process.

    Args:
        finish: returns when all that was asked of the device is done; called at each border, so that work which runs
            beside the process is counted in the phase that asked for it. Whatever overlapped does so no more: on a GPU
            the sum of the phases is what the step would take without any overlap.
        now: nanoseconds of a clock that never goes back.
    """

    def __init__(self, finish: Callable[[], object] | None = None, now: Callable[[], int] = perf_counter_ns) -> None:
        super().__init__()
        self._finish, self._now = finish, now
        self._steps, self._faults, self._delays = array("q"), array("q"), array("q")
        self._spent = [0] * len(PHASES)
        self._inside = [_OTHER]  # the last is the phase under way; the first what lies outside of them all
        self._last: int | None = None
        self._faults_before = self._delay_before = 0
        self._schedule: int | None = None
        self._updated = False
        self._ranges: list[torch.profiler.record_function] | None = None
        self._actions = _Actions(self._borders())

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

    @property
    def delays_ms(self) -> NDArray[np.float64]:
        """(S,) milliseconds of each step in which its thread was ready and others had the processors.

        Of a training with processes that load batches, which work beside it, it is also them that it waits for. Zeros
        where the system does not tell.
        """
        return np.array(self._delays, np.float64) / 1e6

    def name_ranges(self, wanted: bool) -> None:
        """Whether from now on each phase is a range in a trace of PyTorch's profiler, named as in `PHASES`."""
        self._ranges = [] if wanted else None

    def profile(self, action_name: str) -> _Action:
        """Without the generator that it inherits, which costs more than all marks: most actions are no borders."""
        return self._actions[action_name]

    def start(self, action_name: str) -> None:
        self._actions[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        self._actions[action_name].__exit__()

    def describe(self) -> None:
        """Prints nothing: whoever lent the clock reads it."""

    def _borders(self) -> Mapping[str, _Action]:
        """Action of Lightning, or of the `Learner` -> what its beginning and its end mean."""
        return {
            "run_training_epoch": _Action(self._open, _nothing),
            "train_dataloader_next": _Action(self._await, self._receive),
            "batch_to_device": _Action(partial(self._enter, _TRANSFER), self._leave),
            "forward": _Action(partial(self._enter, _FORWARD), self._leave),
            "backward": _Action(partial(self._enter, _BACKWARD), self._leave),
            "optimizer": _Action(partial(self._enter, _OPTIMIZER), self._leave),
            "optimizer_step": _Action(_nothing, self._update),
            "on_train_end": _Action(self._end, _nothing),
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
        self._updated = True

    def _mark(self) -> None:
        """What has passed since the last mark belongs to the phase under way."""
        if self._finish is not None:
            self._finish()
        now = self._now()
        if self._last is not None:
            self._spent[self._inside[-1]] += now - self._last
        self._last = now

    def _close(self) -> None:
        """The step is over where it has changed the weights; where there was none, the first begins."""
        if self._last is None:
            self._mark()
            self._schedule = _schedule(self)
            self._faults_before, self._delay_before = _page_faults(), _delay_ns(self._schedule)
        elif self._updated:
            self._mark()
            self._steps.extend(self._spent)
            faults, delay = _page_faults(), _delay_ns(self._schedule)
            self._faults.append(faults - self._faults_before)
            self._delays.append(delay - self._delay_before)
            self._faults_before, self._delay_before, self._updated = faults, delay, False
            self._spent = [0] * len(PHASES)

    def _end(self) -> None:
        """Several callbacks hear of the end; the first of them closes the last step."""
        if self._updated:
            self._close()


def _nothing() -> None: ...


class _Action:
    """What the clock does where an action of Lightning begins and ends."""

    __slots__ = ("_begin", "_end")

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *error: object) -> None:
        self._end()


class _Actions(dict[str, _Action]):
    """All actions of Lightning by their whole names, of which few are borders."""

    def __init__(self, borders: Mapping[str, _Action]) -> None:
        super().__init__()
        self._borders, self._none = borders, _Action(_nothing, _nothing)

    def __missing__(self, name: str) -> _Action:
        self[name] = self._borders.get(name.rpartition(".")[2], self._none)
        return self[name]


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _schedule(owner: object) -> int | None:
    """The kernel's account of this thread, open as long as there is an owner (proc(5), /proc/pid/schedstat)."""
    try:
        account = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return None
    weakref.finalize(owner, os.close, account)
    return account


def _delay_ns(schedule: int | None) -> int:
    """Nanoseconds that the thread has waited for a processor: the second of three figures."""
    return 0 if schedule is None else int(os.pread(schedule, 64, 0).split()[1])
