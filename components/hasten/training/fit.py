"""Training that ends the same, interrupted or not."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Distillation, Progress, Rows, Task
from hasten.core.sections import TrainingSettings
from hasten.training.determinism import reproducible
from hasten.training.sampler import Batches, ResumableBatches, as_is

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from hasten.training.module import Learner


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained model in eval mode and its curves, one value per epoch.

    Attributes:
        curves: `train_loss`, with classes `train_accuracy` (means over the epoch's batches, in training mode), and `lr`
            (of the epoch's last step).
    """

    model: nn.Module
    curves: Mapping[str, list[float]]


def fit(
    model: nn.Module,
    rows: Rows,
    settings: TrainingSettings,
    *,
    task: Task,
    seed: int,
    threads: int,
    folder: Path,
    checkpoint_seconds: float,
    progress: Progress,
    what: str,
    key: str,
    loss: Distillation | None = None,
    teacher_outputs: NDArray[np.float32] | None = None,
    augment: Sequence[Augment] = (),
    teacher: nn.Module | None = None,
) -> Fitted:
    """Trains a copy of a model on the CPU: AdamW (Loshchilov and Hutter 2019), one cycle (Smith and Topin 2018).

    A training that was killed and is started again with the same arguments goes on from its last checkpoint and ends
    with the same weights and curves, bit for bit, as one that was left alone. A last partial batch is left out; where
    there are fewer rows than `batch_size`, all rows are one batch.

    Args:
        seed: of the order of batches and of whatever the model draws; the generators are left as they were.
        threads: of torch's kernels while training.
        folder: for checkpoints of this training; the caller deletes it when the result is safe.
        checkpoint_seconds: between checkpoints.
        what: is trained, as the progress and errors call it.
        key: of the config section with the settings, such as `model.training`.
        loss: distils from the teacher; None for the task's loss with the targets.
        teacher_outputs: (B, *output_shape) for the rows.
        augment: changes the inputs of every batch at random.
        teacher: in eval mode, in place of `teacher_outputs`: it is asked about every batch as it was changed.

    Raises:
        PassError: the loss became NaN or infinite, or batch normalization met a batch with one value per channel.
        ValueError: a distillation loss without a teacher or the other way round, or stored outputs of a teacher for
            rows that are changed at random.
    """
    if (loss is None) != (teacher_outputs is None and teacher is None):
        raise ValueError("a distillation loss needs a teacher, and a teacher needs a distillation loss")
    if augment and teacher_outputs is not None:
        raise ValueError("a teacher's outputs for the rows are not its outputs for what augmentation makes of them")
    student = copy.deepcopy(model)
    classes = bool(np.issubdtype(rows.targets.dtype, np.integer))
    if settings.epochs == 0:
        return Fitted(model=student.eval(), curves={})
    student.train()  # Lightning keeps each module's mode, and what was rebuilt or pruned comes in eval mode
    with _quiet(), reproducible(seed, threads):
        from hasten.training.module import Learner, ProgressOfSteps

        arrays = (*rows.inputs.values(), rows.targets, *([] if teacher_outputs is None else [teacher_outputs]))
        data = Batches(*map(torch.from_numpy, arrays))
        batch_size = min(settings.batch_size, len(rows))
        steps_per_epoch = len(rows) // batch_size
        learner = Learner(
            student,
            task,
            settings,
            names=tuple(rows.inputs),
            classes=classes,
            loss=loss,
            augment=augment,
            teacher=teacher,
            steps_per_epoch=steps_per_epoch,
            identity=_identity(
                [student, *([] if teacher is None else [teacher])],
                data,
                [asdict(settings), seed, threads, repr(loss), repr(task), repr(augment)],
            ),
            what=what,
            key=key,
        )
        watch = ProgressOfSteps(progress, what, settings.epochs * steps_per_epoch)
        trainer = _trainer(settings.epochs, folder, checkpoint_seconds, watch)
        loader = DataLoader(
            data,
            batch_sampler=ResumableBatches(len(rows), batch_size, seed, lambda: _position(trainer, steps_per_epoch)),
            collate_fn=as_is,
            # Its own, because a loader draws a number from the global one whenever it is iterated.
            generator=torch.Generator(),
        )
        _run(trainer, learner, loader, folder, f"{what}: raise {key}.batch_size (now {settings.batch_size})")
    return Fitted(model=student.eval(), curves=learner.curves)


def _position(trainer: pl.Trainer, steps_per_epoch: int) -> tuple[int, int]:
    return trainer.current_epoch, trainer.global_step - trainer.current_epoch * steps_per_epoch


def _identity(models: Sequence[nn.Module], data: Batches, knobs: list[Any]) -> str:
    """SHA-256 of all that decides the result, so that a checkpoint of another training is never resumed."""
    digest = hashlib.sha256(json.dumps(knobs).encode())
    weights = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    for tensor in (*weights, *data.tensors):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trainer(epochs: int, folder: Path, checkpoint_seconds: float, watch: pl.Callback) -> pl.Trainer:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.environments import LightningEnvironment

    from hasten.training.checkpoint import KEPT, DurableCheckpoints
    from hasten.training.module import RandomState

    checkpoints = ModelCheckpoint(
        dirpath=folder,
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=KEPT,
        train_time_interval=timedelta(seconds=checkpoint_seconds),
        enable_version_counter=False,
    )
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[RandomState(), watch, checkpoints],
        # Named, so that a SLURM or torchrun environment round the process is not taken for a cluster to join.
        plugins=[LightningEnvironment(), DurableCheckpoints()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _run(trainer: pl.Trainer, learner: Learner, loader: DataLoader[Any], folder: Path, remedy: str) -> None:
    from hasten.training.checkpoint import newest

    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(learner, loader, ckpt_path=newest(folder, learner.identity), weights_only=True)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise PassError(f"batch normalization needs more than one value per channel in {remedy}") from error
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit and leaves the signal ignored.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's greetings and the advice that does not apply to tensors in memory."""
    import pytorch_lightning  # noqa: F401  # sets the level of its logger when first imported

    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning_utilities")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*exists and is not empty.*",
            ".*resuming from a checkpoint that ended before the epoch ended.*",
            ".*The dirpath has changed.*",
            ".*isinstance\\(treespec, LeafSpec\\).*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
