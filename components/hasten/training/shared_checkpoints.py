"""When processes that train together write a checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from hasten.distributed.checkpoint import Writing
from hasten.distributed.group import Group
from hasten.distributed.interval import Interval


class SharedCheckpoints(pl.Callback):  # type: ignore[misc]
    """Has the processes of a group write a checkpoint together whenever the first of them says so.

    All look at what it says at the same steps, few of them, after which all have the same weights.

    Args:
        seconds: between checkpoints, where `distributed.mtbf_hours` does not say how often processes fail.
    """

    def __init__(self, folder: Path, seconds: float, group: Group) -> None:
        hours = group.spread.mtbf_hours
        self._folder, self._group = folder, group
        self._interval = Interval(seconds=seconds, mtbf_seconds=None if hours is None else 3600 * hours)
        self._looks_at = 0

    @property
    def told(self) -> str:
        """How often checkpoints were written and what that means, a sentence; empty where nothing was chosen."""
        return self._interval.told

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(self._interval.start(trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
        writing: Writing = trainer.strategy.writing
        busy, step = writing.busy, trainer.global_step
        if step < self._looks_at:
            return
        self._interval.safe_seconds = writing.seconds or 0.0
        due, then = self._group.agreed(self._interval.look(step, busy=busy))
        if due:
            began = time.monotonic()
            trainer.save_checkpoint(self._folder / f"step={step}.ckpt")
            then = self._group.agreed(self._interval.written(step, time.monotonic() - began))
        self._look(then)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writing: Writing = trainer.strategy.writing
        writing.close()
        self._interval.safe_seconds = writing.seconds or 0.0

    def _look(self, step: int) -> None:
        """At the first step from this one on after which processes that go steps of their own average their weights."""
        every = self._group.spread.average_every
        self._looks_at = math.ceil(step / every) * every
