"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO

from hasten.artefacts import durable
from hasten.artefacts.durable import KEPT
from hasten.core.errors import HastenError

_log = logging.getLogger(__name__)


class DurableCheckpoints(CheckpointIO):  # type: ignore[misc]
    """Writes a checkpoint under another name first, with its SHA-256 in front, and renames it when it is on disk.

    Lightning's own writer goes through the system's temporary folder, from where the last move is a copy if that is
    another file system, so a kill can leave half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        durable.write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads tensors and plain data, whatever `weights_only` says; onto the CPU, where nothing else is asked for.

        Raises:
            HastenError: the file is torn or altered.
        """
        return durable.read(Path(path), map_location or "cpu")

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
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._written = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
        if time.monotonic() - self._written < self._seconds:
            return
        trainer.save_checkpoint(self._folder / f"step={trainer.global_step}.ckpt")
        for file in sorted(self._folder.glob("step=*.ckpt"), key=_step)[:-KEPT]:
            file.unlink()
        self._written = time.monotonic()


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
