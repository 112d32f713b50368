"""The training as Lightning sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hasten.core.errors import PassError
from hasten.core.interfaces import Distillation, Progress
from hasten.core.sections import TrainingSettings
from hasten.training.determinism import random_state, restore_random_state


class Learner(pl.LightningModule):  # type: ignore[misc]
    """A classifier under AdamW and a one-cycle learning rate, with its curves.

    The curves and the sums of the epoch under way are part of the checkpoint, and an epoch is closed by the count of
    steps and not by a hook, so that they come out the same wherever a training was interrupted.

    Args:
        model: trained in place.
        loss: of student, teacher and labels; None for cross-entropy with the labels.
        steps_per_epoch: batches of a whole epoch.
        identity: of the training, kept in its checkpoints.
        what: is trained, for error messages.
        key: of the config section with the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Distillation | None,
        settings: TrainingSettings,
        *,
        steps_per_epoch: int,
        identity: str,
        what: str,
        key: str,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss, self._settings, self._steps_per_epoch = loss, settings, steps_per_epoch
        self.identity, self._what, self._key = identity, what, key
        self.curves: dict[str, list[float]] = {"train_loss": [], "train_accuracy": [], "lr": []}
        self._sums = {"loss": 0.0, "correct": 0, "rows": 0}

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        inputs, labels_B = batch[:2]
        outputs_BC = self.model(inputs)
        loss = self._loss.loss(outputs_BC, batch[2], labels_B) if self._loss else cross_entropy(outputs_BC, labels_B)
        value = loss.item()
        if not math.isfinite(value):
            raise PassError(
                f"the loss became {value} at step {self.global_step + 1} of {self._what}: "
                f"lower {self._key}.lr (now {self._settings.lr:g})"
            )
        self._record(value, int((outputs_BC.argmax(1) == labels_B).sum()), len(labels_B))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=self._settings.lr,
            weight_decay=self._settings.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self._settings.lr, total_steps=self._settings.epochs * self._steps_per_epoch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"identity": self.identity, "curves": self.curves, "sums": self._sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curves, self._sums = checkpoint["curves"], checkpoint["sums"]

    def _record(self, loss: float, correct: int, rows: int) -> None:
        self._sums["loss"] += loss * rows
        self._sums["correct"] += correct
        self._sums["rows"] += rows
        if (self.global_step + 1) % self._steps_per_epoch == 0:
            self.curves["train_loss"].append(self._sums["loss"] / self._sums["rows"])
            self.curves["train_accuracy"].append(self._sums["correct"] / self._sums["rows"])
            self.curves["lr"].append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self._sums = {"loss": 0.0, "correct": 0, "rows": 0}


class RandomState(pl.Callback):  # type: ignore[misc]
    """Keeps the state of all generators in the checkpoint: a resumed dropout draws what it would have drawn."""

    def __init__(self) -> None:
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is not None:
            restore_random_state(self._loaded)


class ProgressOfSteps(pl.Callback):  # type: ignore[misc]
    """Tells a `Progress` of every step, those from before a resume at once."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.start(self._what, self._total)
        if trainer.global_step:
            self._progress.advance(trainer.global_step)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._progress.advance()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._progress.stop()
