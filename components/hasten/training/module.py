"""The training as Lightning sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Progress, Task
from hasten.core.sections import TrainingSettings
from hasten.training.determinism import random_state, restore_random_state
from hasten.training.lesson import Lesson
from hasten.training.schedule import scheduler


class Learner(pl.LightningModule):  # type: ignore[misc]
    """A model under AdamW with a learning rate for each step, and its curves.

    The curves and the sums of the epoch under way are part of the checkpoint, and an epoch is closed by the count of
    steps and not by a hook, so that they come out the same wherever a training was interrupted.

    Args:
        model: trained in place.
        task: whose loss is minimised where there is no other.
        names: of the model's inputs. A batch holds them in this order, then the targets, then the teacher's outputs.
        classes: whether the targets are classes, so that there is an accuracy to follow.
        lesson: that the model is taught; None for the task's loss.
        augment: what is done to the inputs of a batch, one after the other.
        steps_per_epoch: batches of a whole epoch.
        total_steps: of the training, over which the learning rate goes through its schedule.
        batch_size: rows of a step.
        identity: of the training, kept in its checkpoints.
        what: is trained, for error messages.
        key: of the config section with the settings.

    Attributes:
        last_loss: of the last step.
        notes: what the report should say of how it was trained, one sentence each.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: TrainingSettings,
        *,
        names: Sequence[str],
        classes: bool,
        lesson: Lesson | None,
        augment: Sequence[Augment],
        steps_per_epoch: int,
        total_steps: int,
        batch_size: int,
        identity: str,
        what: str,
        key: str,
    ) -> None:
        super().__init__()
        self.model, self.lesson = model, lesson
        self._task, self._settings = task, settings
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._names, self._classes, self._augment = names, classes, augment
        self.identity, self._what, self._key = identity, what, key
        self.curves: dict[str, list[float]] = {name: [] for name in curve_names(classes)}
        self._sums = {"loss": 0.0, "correct": 0, "rows": 0}
        self.batch_size, self.last_loss = batch_size, math.nan
        self.notes: list[str] = []

    def on_train_start(self) -> None:
        if self.lesson is not None:
            self.lesson.teach_on(self.device)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss, outputs, targets = self._judged(batch, self._augment)
        value = self.last_loss = loss.item()
        if not math.isfinite(value):
            raise PassError(
                f"the loss became {value} at step {self.global_step + 1} of {self._what}: "
                f"lower {self._key}.lr (now {self._settings.lr:g})"
            )
        self._record(value, int((outputs.argmax(1) == targets).sum()) if self._classes else 0, len(targets))
        return loss

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """What training minimises, of rows as they are: a scalar, mean of the batch."""
        return self._judged(batch, ())[0]

    def _judged(self, batch: tuple[Tensor, ...], augment: Sequence[Augment]) -> tuple[Tensor, Tensor, Tensor]:
        inputs: Mapping[str, Tensor] = dict(zip(self._names, batch, strict=False))
        targets, *answers = batch[len(self._names) :]
        for change in augment:
            inputs = change(inputs)
        outputs = forward(self.model, inputs)
        if self.lesson is None:
            return self._task.loss(outputs, targets), outputs, targets
        loss = self.lesson(inputs, outputs, answers[0] if answers else None, targets, self._task)
        return loss, outputs, targets

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            lr=self._settings.lr,
            weight_decay=self._settings.weight_decay,
            fused=self.device.type != "xla",  # for which PyTorch has no fused one
        )
        schedule = scheduler(self._settings.schedule, optimizer, self._settings.lr, self._total_steps)
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
            if self._classes:
                self.curves["train_accuracy"].append(self._sums["correct"] / self._sums["rows"])
            self.curves["lr"].append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self._sums = {"loss": 0.0, "correct": 0, "rows": 0}


def curve_names(classes: bool) -> tuple[str, ...]:
    """Quantities that are followed, one value an epoch."""
    return ("train_loss", "train_accuracy", "lr") if classes else ("train_loss", "lr")


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
