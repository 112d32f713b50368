"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO

from hasten.core.errors import HastenError
from hasten.distributed.group import Group

FIRST_LOOK = 5
"""Steps of a group of processes after which its first knows how long they take."""
KEPT = 2
"""Checkpoints that are kept: the latest, and one to go back to."""

_log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


class DurableCheckpoints(CheckpointIO):  # type: ignore[misc]
    """Writes a checkpoint under another name first, with its SHA-256 in front, and renames it when it is on disk.

    Lightning's own writer goes through the system's temporary folder, from where the last move is a copy if that is
    another file system, so a kill can leave half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        file = Path(path)
        temporary = file.with_name(f"{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(hashlib.sha256(buffer.getbuffer()).digest())
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads tensors and plain data, whatever `weights_only` says; onto the CPU, where nothing else is asked for.

        Raises:
            HastenError: the file is torn or altered.
        """
        content = Path(path).read_bytes()
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            raise HastenError(f"checkpoint {path} is torn: its SHA-256 does not match")
        stream = io.BytesIO(content[_DIGEST_BYTES:])
        checkpoint: dict[str, Any] = torch.load(stream, map_location=map_location or "cpu", weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class CheckpointsOfTpu(_WrappingCheckpointIO):  # type: ignore[misc]
    """Durable checkpoints in the only form that Lightning takes on a TPU; its tensors come to the CPU first."""

    def __init__(self) -> None:
        super().__init__(DurableCheckpoints())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(move_data_to_device(checkpoint, "cpu"), path, storage_options)


class TimedCheckpoints(pl.Callback):  # type: ignore[misc]
    """Writes a checkpoint at the end of the first step after so many seconds, and keeps the latest.

    Lightning's own callback does not go by time where a module optimizes by itself (pytorch-lightning 2.6).

    Args:
        seconds: between checkpoints.
        group: of processes whose first decides: its clock is looked at after as many steps as are expected to take so
            long. None for one alone.
    """

    def __init__(self, folder: Path, seconds: float, group: Group | None = None) -> None:
        self._folder, self._seconds, self._group = folder, seconds, group
        self._written = time.monotonic()
        self._written_at = self._looks_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written, self._written_at = time.monotonic(), trainer.global_step
        self._looks_at = trainer.global_step + FIRST_LOOK

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
        if not self._is_due(trainer.global_step):
            return
        trainer.save_checkpoint(self._folder / f"step={trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            for file in sorted(self._folder.glob("step=*.ckpt"), key=_step)[:-KEPT]:
                file.unlink()
        self._written, self._written_at = time.monotonic(), trainer.global_step

    def _is_due(self, step: int) -> bool:
        if self._group is None:
            return time.monotonic() - self._written >= self._seconds
        if step < self._looks_at:
            return False
        passed = time.monotonic() - self._written
        step_seconds = passed / (step - self._written_at)
        left = self._seconds - passed if passed < self._seconds else self._seconds
        due, steps = self._group.agreed((passed >= self._seconds, ceil(left / step_seconds)))
        self._looks_at = step + steps
        return due


def newest(folder: Path, identity: str) -> Path | None:
    """The latest whole checkpoint of the training with this identity.

    Torn checkpoints, those of other trainings and all but one before the latest are deleted.

    Returns:
        None where there is no such checkpoint and the training has to start afresh.
    """
    for partial in folder.glob("*.partial"):
        partial.unlink()
    whole: list[Path] = []
    for file in sorted(folder.glob("step=*.ckpt"), key=_step, reverse=True):
        if len(whole) < KEPT and _is_whole(file, identity):
            whole.append(file)
        else:
            file.unlink()
    return whole[0] if whole else None


def _is_whole(file: Path, identity: str) -> bool:
    try:
        checkpoint: Mapping[str, Any] = DurableCheckpoints().load_checkpoint(file)
    except HastenError as error:
        _log.info("%s; going back to the one before", error)
        return False
    return bool(checkpoint.get("identity") == identity)


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step="))
