"""The training as Lightning sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Progress, Task
from hasten.core.sections import Step, TrainingSettings
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.data_parallel import error_feedback, restore_error_feedback
from hasten.distributed.group import Group
from hasten.distributed.local_steps import average
from hasten.distributed.parameters import by_mesh, clip_gradients, complete_gradients
from hasten.training.determinism import random_state, restore_random_state
from hasten.training.lesson import Lesson
from hasten.training.schedule import scheduler
from hasten.training.step import ForwardPass, parts

if TYPE_CHECKING:
    from hasten.distributed.pipeline import Pipeline


class Learner(pl.LightningModule):  # type: ignore[misc]
    """A model under AdamW with a learning rate for each step, and its curves.

    The curves and the sums of the epoch under way are part of the checkpoint, and an epoch is closed by the count of
    steps and not by a hook, so that they come out the same wherever a training was interrupted.

    Args:
        model: trained in place.
        task: whose loss is minimised where there is no other.
        settings: with the batch size and the learning rate of a whole step.
        step: how a step is calculated.
        device: type of the device that trains, such as `cpu`.
        names: of the model's inputs. A batch holds them in this order, then the targets, then the teacher's outputs.
        classes: whether the targets are classes, so that there is an accuracy to follow.
        lesson: that the model is taught; None for the task's loss.
        augment: what is done to the inputs of a batch, one after the other.
        steps_per_epoch: batches of a whole epoch.
        total_steps: of the training, over which the learning rate goes through its schedule.
        identity: of the training, kept in its checkpoints.
        group: that the process trains in; None where it trains alone.
        plan: by which layers are divided among its processes.
        tried: a few rows, on which that is tried.
        diverged: what to do where the loss is no number, for the error message.
        what: is trained, for error messages.
        pipeline: that the model is a part of; None where it is whole.

    Attributes:
        notes: what the report should say of how it was trained, one sentence each.
        rehearsal: rows of a step that is tried before a training goes on, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: TrainingSettings,
        step: Step,
        *,
        device: str,
        names: Sequence[str],
        classes: bool,
        lesson: Lesson | None,
        augment: Sequence[Augment],
        steps_per_epoch: int,
        total_steps: int,
        identity: str,
        diverged: str,
        what: str,
        group: Group | None = None,
        plan: TensorPlan = WHOLE,
        tried: Mapping[str, Tensor] = MappingProxyType({}),
        pipeline: Pipeline | None = None,
    ) -> None:
        super().__init__()
        # A step is calculated here, by `calculate_loss`, `calculate_gradients` and `update_weights`.
        self.automatic_optimization = False
        self.model, self.lesson = model, lesson
        self._group, self._plan, self._tried, self._pipeline = group, plan, tried, pipeline
        self._forward = ForwardPass(model, step, device)
        if lesson is not None and group is not None and not group.spread.local_steps:
            lesson.average(group)
        self._task, self._settings, self._step = task, settings, step
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._names, self._classes, self._augment = names, classes, augment
        self.identity, self._diverged, self._what = identity, diverged, what
        self.curves: dict[str, list[float]] = {name: [] for name in curve_names(classes)}
        self._sums: dict[str, float] = {"loss": 0.0, "correct": 0, "rows": 0}
        self.notes: list[str] = []
        self.rehearsal: tuple[Tensor, ...] | None = None
        self._last_loss, self._last_rows = math.nan, 0
        self._unread: _StepOutcome | None = None

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self._settings.batch_size

    @property
    def last_loss(self) -> float:
        """Of the last step, for which a device may have to be waited."""
        return self._last_loss if self._unread is None else self._unread.values()[0]

    @property
    def averaged(self) -> DistributedDataParallel | None:
        """Where gradients are averaged over processes; None where they are not, or not by themselves."""
        return self._forward.averaged

    @property
    def last_share(self) -> float:
        """Share of the rows of the last step that this process saw."""
        return self._last_rows / self.batch_size

    def configure_model(self) -> None:
        """Spreads the model over the processes, after all that is to be known of the whole one was measured."""
        if self._pipeline is not None:
            self._pipeline.spread()
        elif self._group is not None:
            self._forward.spread(self._group, self._plan, self._tried)

    def on_fit_start(self) -> None:
        """Before a state is read into it, in which nothing of this is left."""
        if self.rehearsal is not None and self.averaged is not None:
            # Only after a backward pass are gradients averaged in the order in which they come, bucket by bucket: in
            # another order more than two processes would add them up to something else than they did before.
            loss, _ = self.calculate_loss(self.rehearsal)
            loss.backward()  # type: ignore[no-untyped-call]
            self.zero_grad()

    def on_train_start(self) -> None:
        if self.lesson is not None:
            self.lesson.teach_on(self.device)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """One update of the weights, by the gradients of all rows of the batch."""
        with self._phase("forward"):
            tensors = self._changed(batch)
        optimizer = self.optimizers()
        with self._phase("optimizer"):
            optimizer.zero_grad()
        if self._pipeline is not None:
            outcome = self._pipeline.step(tensors[: len(self._names)], self._judge_of(tensors), self._phase)
            with self._phase("optimizer"):
                self.update_weights(optimizer)
            self._close_step(*outcome, len(tensors[0]))
            return
        losses, corrects = [], []
        pieces = [*parts(tensors, self._step.micro_batches)]
        weight = self._weight(len(tensors[0]))
        for number, (part, share) in enumerate(pieces, 1):
            with self._forward.communicating(number == len(pieces)):
                with self._phase("forward"):
                    loss, correct = self.calculate_loss(part)
                    if share != 1:
                        loss = loss * share
                with self._phase("backward"):
                    self.calculate_gradients(loss if weight == 1 else loss * weight)
            losses.append(loss.detach())
            corrects.append(correct)
        with self._phase("optimizer"):
            self.update_weights(optimizer)
            if self._group is not None and self._is_averaged():
                average([*self._trained(), *self.model.buffers()], self._group)
        self._close_step(_total(losses), _total(corrects), len(tensors[0]))

    def _judge_of(self, tensors: tuple[Tensor, ...]) -> Callable[[Tensor, slice], tuple[Tensor, Tensor | int]]:
        """What tells the loss of some of these rows, weighted with their share, and how many of them are right."""

        def judge(outputs: Tensor, numbers: slice) -> tuple[Tensor, Tensor | int]:
            with self._phase("forward"):
                inputs, targets, answers = self._named(tuple(each[numbers] for each in tensors))
                loss = self._judged(inputs, outputs, answers, targets) * (len(targets) / len(tensors[0]))
                return loss, (outputs.argmax(1) == targets).sum() if self._classes else 0

        return judge

    def _is_averaged(self) -> bool:
        """Whether this step ends with the same weights in all processes that go steps of their own: every so many, at
        the end, and where rows that are held out are to be judged alike by all."""
        if self._group is None or not self._group.spread.local_steps:
            return False
        step = int(self.global_step)
        judged = self._settings.patience is not None and step % self._steps_per_epoch == 0
        return judged or step % self._group.spread.average_every == 0 or step == self._total_steps

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _weight(self, num_rows: int) -> float:
        """Of this process' mean loss: the mean of all gradients is then that of all rows, whoever has how many."""
        return 1.0 if self._group is None else num_rows * self._group.shape.data / self.batch_size

    def _phase(self, name: str) -> AbstractContextManager[object]:
        """One of `core.trial.PHASES`, told to whatever watches the Trainer."""
        phase: AbstractContextManager[object] = self.trainer.profiler.profile(name)
        return phase

    def calculate_loss(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | int]:
        """The forward pass: mean loss of the rows, a float32 scalar, and how many are classified rightly."""
        inputs, targets, answers = self._named(rows)
        outputs = self._forward(inputs)
        loss = self._judged(inputs, outputs, answers, targets)
        return loss, (outputs.argmax(1) == targets).sum() if self._classes else 0

    def calculate_gradients(self, loss: Tensor) -> None:
        """The backward pass; gradients add up to those that there are."""
        self.manual_backward(loss)

    def update_weights(self, optimizer: Any) -> None:
        if self._group is not None and self._group.shape.tensor > 1:
            complete_gradients(self.parameters())
        if self._step.clip_norm is not None:
            if self._group is None:
                torch.nn.utils.clip_grad_norm_(self.parameters(), self._step.clip_norm)
            else:
                clip_gradients(self.parameters(), self._step.clip_norm, self._group)
        optimizer.step()

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """What training minimises, of rows as they are and in float32: a scalar, mean of the batch."""
        inputs, targets, answers = self._named(batch)
        return self._judged(inputs, self._forward.plain(inputs), answers, targets)

    def _changed(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self._augment:
            return batch
        inputs: Mapping[str, Tensor] = dict(zip(self._names, batch, strict=False))
        with nullcontext() if self._pipeline is None else self._pipeline.same_draws(self.global_step):
            for change in self._augment:
                inputs = change(inputs)
        return (*(inputs[name] for name in self._names), *batch[len(self._names) :])

    def _named(self, batch: tuple[Tensor, ...]) -> tuple[Mapping[str, Tensor], Tensor, Tensor | None]:
        targets, *answers = batch[len(self._names) :]
        return dict(zip(self._names, batch, strict=False)), targets, answers[0] if answers else None

    def _judged(self, inputs: Mapping[str, Tensor], outputs: Tensor, answers: Tensor | None, targets: Tensor) -> Tensor:
        if self.lesson is None:
            return self._task.loss(outputs, targets)
        loss: Tensor = self.lesson(inputs, outputs, answers, targets, self._task)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        # For XLA PyTorch has no kernels but those that run one by one, which XLA fuses.
        kernels = "for_loop" if self.device.type == "xla" else self._step.optimizer_kernels
        optimizer = torch.optim.AdamW(
            [{"params": alike} for alike in by_mesh(self._trained())],
            lr=self._settings.lr,
            weight_decay=self._settings.weight_decay,
            fused=kernels == "fused",
            foreach=kernels == "foreach",
        )
        schedule = scheduler(self._settings.schedule, optimizer, self._settings.lr, self._total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._read()
        checkpoint |= {"identity": self.identity, "curves": self.curves, "sums": self._sums_of_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curves, self._sums = checkpoint["curves"], checkpoint["sums"]
        if self._group is not None and self._group.rows_rank:
            self._sums = dict.fromkeys(self._sums, 0)  # the first has those of all

    def _close_step(self, loss: Tensor, correct: Tensor | int, rows: int) -> None:
        """Follows the curves. The loss of a step is looked at after the next, so that a GPU is never waited for."""
        self._read()
        self._unread, self._last_rows = _StepOutcome.of(self.global_step, loss, correct, rows), rows
        schedule = self.lr_schedulers()
        if self.global_step % self._steps_per_epoch == 0:
            self._read()
            self._close_epoch(self.trainer.optimizers[0].param_groups[0]["lr"])
        schedule.step()

    def _read(self) -> None:
        """Adds the outcome of the latest step to the sums of its epoch.

        Raises:
            PassError: its loss is NaN or infinite.
        """
        if self._unread is None:
            return
        outcome, self._unread = self._unread, None
        loss, correct = outcome.values()
        self._last_loss = loss
        if not math.isfinite(loss):
            raise PassError(f"the loss became {loss} at step {outcome.step} of {self._what}: {self._diverged}")
        self._sums["loss"] += loss * outcome.rows
        self._sums["correct"] += correct
        self._sums["rows"] += outcome.rows

    def _close_epoch(self, lr: float) -> None:
        sums = self._sums_of_all()
        self.curves["train_loss"].append(sums["loss"] / sums["rows"])
        if self._classes:
            self.curves["train_accuracy"].append(sums["correct"] / sums["rows"])
        self.curves["lr"].append(lr)
        self._sums = {"loss": 0.0, "correct": 0, "rows": 0}

    def _sums_of_all(self) -> dict[str, float]:
        if self._group is None:
            return self._sums
        return dict(zip(self._sums, self._group.total(list(self._sums.values())), strict=True))


class _StepOutcome(NamedTuple):
    """Of a step: scalars that may still be on their way from the device.

    Attributes:
        step: its number, from 1.
        correct: rows that were classified rightly.
        arrived: after which they may be read; None where reading waits by itself.
    """

    step: int
    loss: Tensor
    correct: Tensor | int
    rows: int
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, loss: Tensor, correct: Tensor | int, rows: int) -> _StepOutcome:
        if loss.device.type != "cuda":
            return cls(step, loss, correct, rows, None)
        loss = loss.to("cpu", non_blocking=True)
        if isinstance(correct, Tensor):
            correct = correct.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(step, loss, correct, rows, arrived)

    def values(self) -> tuple[float, int]:
        """Loss and number of rows that are right."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.loss.item(), int(self.correct)


def _total(values: Sequence[Any]) -> Any:
    return sum(values[1:], start=values[0])


def curve_names(classes: bool) -> tuple[str, ...]:
    """Quantities that are followed, one value an epoch."""
    return ("train_loss", "train_accuracy", "lr") if classes else ("train_loss", "lr")


class RandomState(pl.Callback):  # type: ignore[misc]
    """Keeps the state of all generators in the checkpoint: a resumed dropout draws what it would have drawn."""

    of_this_process = True

    def __init__(self) -> None:
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is not None:
            restore_random_state(self._loaded)


class ErrorFeedback(pl.Callback):  # type: ignore[misc]
    """Keeps in the checkpoint what compression has left out so far of the gradients of this process.

    Processes that are arranged otherwise than those that wrote it begin without.
    """

    of_this_process = True

    def __init__(self, group: Group) -> None:
        self._shape = tuple(group.shape)
        self._loaded: Mapping[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._learner = pl_module

    def state_dict(self) -> dict[str, Any]:
        averaged = self._learner.averaged
        kept = {} if averaged is None else error_feedback(averaged)
        return {"shape": self._shape, "kept": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["kept"] if state_dict["shape"] == self._shape else {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded and pl_module.averaged is not None:
            restore_error_feedback(pl_module.averaged, self._loaded)


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
