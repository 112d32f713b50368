"""Training that ends the same, interrupted or not."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import math
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hasten.artefacts.rows import take
from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Distillation, Progress, Rows, Task
from hasten.core.sections import Accelerator, Loader, Step, TrainingSettings
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.training.batches import Batches
from hasten.training.cache import cached, resolved, size_bytes
from hasten.training.determinism import reproducible
from hasten.training.device import LIGHTNING, device_of
from hasten.training.loading import BatchLoader, Readings, delivered_bytes, sparing
from hasten.training.recompute import budgeted
from hasten.training.sampler import Blocks, ResumableBatches
from hasten.training.step import compiling, scaled

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from hasten.distributed.group import Group
    from hasten.training.lesson import Lesson
    from hasten.training.module import Learner
    from hasten.training.step_clock import StepClock

TRIED_ROWS = 4
"""On which it is tried what a model keeps for its backward pass."""
LOADER = Loader()
"""How rows reach a training that has nothing to say about it."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained model in eval mode and its curves, one value per epoch.

    Attributes:
        model: with the weights of its best epoch where the settings have a patience, else of its last. Of a group that
            divides it each process has its share, which `distributed.checkpoint.write_weights` puts together.
        curves: `train_loss`, with classes `train_accuracy` (means over the epoch's batches, in training mode), `lr`
            (of the epoch's last step), and with a patience `held_out_loss` (in eval mode, at the epoch's end).
        readings: of each epoch that was trained now: of a training that was resumed, those since then.
        reads_storage: rows are mapped from files, or so many that their order spares storage.
        cache: where the rows were kept and why, a sentence; empty where nothing was read.
        notes: what the user should know of how it was calculated, one sentence each.
    """

    model: nn.Module
    curves: Mapping[str, list[float]]
    readings: tuple[Readings, ...] = ()
    reads_storage: bool = False
    cache: str = ""
    notes: tuple[str, ...] = ()


def fit(
    model: nn.Module,
    rows: Rows,
    settings: TrainingSettings,
    *,
    task: Task,
    seed: int,
    threads: int,
    accelerator: Accelerator = "cpu",
    folder: Path,
    checkpoint_seconds: float,
    progress: Progress,
    what: str,
    key: str,
    loss: Distillation | None = None,
    teacher_outputs: NDArray[np.float32] | None = None,
    teachers: Sequence[nn.Module] = (),
    augment: Sequence[Augment] = (),
    loader: Loader = LOADER,
    contents: str | None = None,
    step: Step = Step(),  # noqa: B008  # frozen
    steps: int | None = None,
    clock: StepClock | None = None,
    callbacks: Sequence[pl.Callback] = (),
    group: Group | None = None,
    plan: TensorPlan = WHOLE,
) -> Fitted:
    """Trains a copy of a model: AdamW (Loshchilov and Hutter 2019), with a schedule of `training.schedule`.

    A training that was killed and is started again with the same arguments goes on from its last checkpoint and ends
    with the same weights and curves, bit for bit, as one that was left alone. A last partial batch is left out; where
    there are fewer rows than `batch_size`, all rows are one batch.

    Args:
        seed: of the order of batches, of whatever the model draws, of the rows that are held out and of what a
            distillation learns beside the model; the generators are left as they were.
        threads: of torch's kernels while training.
        accelerator: that trains; model and teachers are on the CPU before and after.
        folder: for checkpoints of this training; the caller deletes it when the result is safe.
        checkpoint_seconds: between checkpoints.
        what: is trained, as the progress and errors call it.
        key: of the config section with the settings, such as `model.training`.
        loss: distils from the teacher; None for the task's loss with the targets.
        teacher_outputs: (B, *output_shape), an answer for each of the rows.
        teachers: in eval mode, in place of `teacher_outputs`: they are asked about every batch as it was changed.
        augment: changes the inputs of every batch at random.
        loader: how rows reach the training.
        contents: names what is in `rows` and `teacher_outputs`, so that they need not be read to know a checkpoint of
            the same training; None where nothing does.
        step: how a step is calculated, and on how many rows.
        steps: after which the training ends, with its whole schedule in them, in place of `settings.epochs`.
        clock: splits the time of each step into its phases; the result is the same with it.
        callbacks: that only watch.
        group: of processes that train together, each of which calls this with the same arguments and writes its share
            of the checkpoints. None where this one trains alone.
        plan: by which they divide the layers of the model.

    Raises:
        PassError: the loss became NaN or infinite, batch normalization met a batch with one value per channel, there is
            no row to hold out, the accelerator can't calculate the same twice, the model can't be compiled, or its
            activations can't be made to fit their budget.
        ConfigError: the distillation names a layer that there is not, or the plan does not fit the model.
        ValueError: a distillation loss without a teacher or the other way round, or stored outputs of a teacher that
            can't be its answers: for rows that are changed at random, of another number, or where layers are compared.
    """
    _check_teaching(loss, len(rows), teacher_outputs, teachers, augment)
    student = copy.deepcopy(model)
    if settings.epochs == 0:
        return Fitted(model=student.eval(), curves={})
    delivered = delivered_bytes()
    row_bytes = size_bytes(rows) / len(rows)
    loader = resolved(loader, rows)
    rows, cache = cached(rows, loader.cache)
    loader = sparing(loader, rows, threads, accelerator)
    student.train()  # Lightning keeps each module's mode, and what was rebuilt or pruned comes in eval mode
    with (
        _quiet(),
        # What a model draws, and how rows are changed, belongs to the rows.
        reproducible((seed + (group.draws if group else 0)) % 2**32, threads, accelerator),
        compiling(step, what),
        _lesson(loss, student, teachers, rows, seed) as lesson,
    ):
        from hasten.training.held_out import HeldOut
        from hasten.training.module import Learner, ProgressOfSteps

        data = Batches(rows, teacher_outputs)
        train, judge = _divided(data, rows, settings, seed, key)
        whole = scaled(settings, step, len(train))
        if group and whole.batch_size < group.shape.data * step.micro_batches:
            raise PassError(
                f"{key}.batch_size={whole.batch_size} has no row for each of {group.shape.data} processes"
                f" (distributed.devices={group.size}) in each of trainer.micro_batches={step.micro_batches} parts"
            )
        steps_per_epoch, part_rows = len(train) // whole.batch_size, math.ceil(whole.batch_size / step.micro_batches)
        total_steps = settings.epochs * steps_per_epoch if steps is None else steps
        blocks = Blocks(rows=loader.block_rows, window=loader.window_blocks) if loader.order == "blocks" else None
        tensors = {name: torch.from_numpy(values) for name, values in few(rows, TRIED_ROWS).inputs.items()}
        identity = _identity(
            [student, *teachers, *([] if lesson is None else [lesson])],
            data if contents is None else contents,
            [
                *(asdict(settings), asdict(step), total_steps, seed, threads, accelerator),
                *map(repr, (loss, task, augment, blocks)),
                *([] if group is None else [group.spread.lossy]),
            ],
        )
        pipeline = None
        if group and group.shape.pipeline > 1:
            from hasten.training.pipelined import micro_rows, pipelined, refuse

            refuse(student, settings, loss, key)
            first = few(rows, micro_rows(whole, step, group, key))
            pipeline = pipelined(
                student,
                {name: torch.from_numpy(values) for name, values in first.inputs.items()},
                step,
                group,
                plan=plan,
                tried=tensors,
                folder=folder,
                identity=identity,
                seed=seed,
                what=what,
            )
            student = pipeline.part
        learner = Learner(
            student,
            task,
            whole,
            step,
            device=device_of(accelerator).type,
            names=tuple(few(rows).inputs),
            classes=bool(np.issubdtype(rows.targets.dtype, np.integer)),
            lesson=lesson,
            augment=augment,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            identity=identity,
            pipeline=pipeline,
            group=group,
            plan=plan,
            tried=tensors,
            diverged=f"lower {key}.lr (now {settings.lr:g})",
            what=what,
        )
        told: list[pl.Callback] = [ProgressOfSteps(progress, what, total_steps), *callbacks]
        held_out = None
        if judge is not None and settings.patience is not None:
            held_out = HeldOut(
                judge,
                batch_size=part_rows,
                steps_per_epoch=steps_per_epoch,
                patience=settings.patience,
                group=group,
            )
            told.append(held_out)
        checkpoints = None
        if group:
            from hasten.training.module import ErrorFeedback
            from hasten.training.shared_checkpoints import SharedCheckpoints

            checkpoints = SharedCheckpoints(folder, checkpoint_seconds, group)
            told += [ErrorFeedback(group), checkpoints]
        trainer = _trainer(accelerator, settings.epochs, steps, folder, checkpoint_seconds, told, step, clock, group)
        order = ResumableBatches(
            len(train),
            whole.batch_size,
            seed,
            lambda: _position(trainer, steps_per_epoch),
            blocks=blocks,
            announce=train.announced() if blocks else lambda numbers: None,
            rank=group.rows_rank if group else 0,
            world_size=group.shape.data if group else 1,
            parts=step.micro_batches,
        )
        remedy = f"{what}: raise {key}.batch_size (now {settings.batch_size})"
        pin = loader.pin_memory and accelerator == "cuda" and torch.cuda.is_available()
        with (
            budgeted(student, step, tensors, math.ceil(part_rows / order.world_size), what) as notes,
            _synchronized(student, group),
            BatchLoader(train, order, loader, pin=pin, delivered=delivered, row_bytes=row_bytes) as batches,
            _little_garbage(),
        ):
            learner.notes += [f"{cache}.", *notes]
            checkpoint = _newest(folder, learner.identity, group)
            if checkpoint and group:
                share = whole.batch_size // (group.shape.data * step.micro_batches)
                learner.rehearsal = train.__getitems__(np.arange(share))
            _run(trainer, learner, batches, checkpoint, accelerator, remedy)
        if held_out is not None:
            held_out.restore(student)
    if step.layout != "contiguous":
        student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Fitted(
        model=student.cpu().eval(),
        curves=learner.curves,
        readings=tuple(batches.readings),
        reads_storage=loader.cache == "disk" or loader.order == "blocks",
        cache=cache,
        notes=(
            *notes,
            *([pipeline.told] if pipeline else []),
            *([f"{checkpoints.told}."] if checkpoints and checkpoints.told else []),
        ),
    )


def few(rows: Rows, number: int = 2) -> Rows:
    """The first rows as a model takes them, or all where there are fewer, to see what they are like."""
    return take(rows, np.arange(min(number, len(rows))))


def _check_teaching(
    loss: Distillation | None,
    num_rows: int,
    outputs: NDArray[np.float32] | None,
    teachers: Sequence[nn.Module],
    augment: Sequence[Augment],
) -> None:
    if (loss is None) != (outputs is None and not teachers):
        raise ValueError("a distillation loss needs a teacher, and a teacher needs a distillation loss")
    if outputs is None:
        return
    if augment:
        raise ValueError("a teacher's outputs for the rows are not its outputs for what augmentation makes of them")
    if loss is not None and any(loss.layers):
        raise ValueError("a teacher's outputs do not tell what its layers give: lend the teacher itself")
    if len(outputs) != num_rows:
        raise ValueError(f"a teacher's {len(outputs)} outputs are no answers for {num_rows} rows")


@contextmanager
def _lesson(
    loss: Distillation | None, student: nn.Module, teachers: Sequence[nn.Module], rows: Rows, seed: int
) -> Iterator[Lesson | None]:
    """What the student is taught; afterwards it and its teachers are without hooks."""
    from hasten.training.lesson import Lesson

    if loss is None:
        yield None
        return
    lesson = Lesson(
        loss, student, teachers, {name: torch.from_numpy(values) for name, values in few(rows).inputs.items()}, seed
    )
    try:
        yield lesson
    finally:
        lesson.close()


def _divided(
    data: Batches, rows: Rows, settings: TrainingSettings, seed: int, key: str
) -> tuple[Batches, Batches | None]:
    """Rows to train on and, with a patience, those that are held out."""
    from hasten.training.held_out import divide

    if settings.patience is None:
        return data, None
    if len(rows) < 2:
        raise PassError(f"{key}.patience needs a row to train on and a row to hold out, got {len(rows)}")
    train, judge = divide(len(rows), settings.held_out, seed, in_order=rows.in_order)
    return data.part(train), data.part(judge)


def _position(trainer: pl.Trainer, steps_per_epoch: int) -> tuple[int, int]:
    return trainer.current_epoch, trainer.global_step - trainer.current_epoch * steps_per_epoch


def _identity(models: Sequence[nn.Module], data: Batches | str, knobs: list[Any]) -> str:
    """SHA-256 of all that decides the result, so that a checkpoint of another training is never resumed."""
    digest = hashlib.sha256(json.dumps(knobs).encode())
    weights = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    for tensor in weights:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().data)
    if isinstance(data, str):
        digest.update(data.encode())
        return digest.hexdigest()
    digest.update(repr(data.rows.deferred).encode())
    for values in data.columns:
        digest.update(f"{values.dtype}{values.shape}".encode())
        contents = values.tolist() if values.dtype.kind == "O" else [np.ascontiguousarray(values).data]
        for content in contents:
            digest.update(content.encode() if isinstance(content, str) else content)
    return digest.hexdigest()


@contextmanager
def _synchronized(model: nn.Module, group: Group | None) -> Iterator[None]:
    """Where batch normalization sees the rows of all processes, if they take their steps together."""
    if group is None or group.spread.local_steps:
        yield
        return
    from hasten.distributed.batch_norm import restore, synchronize

    before = synchronize(model, group)
    try:
        yield
    finally:
        restore(before)


def _newest(folder: Path, identity: str, group: Group | None) -> Path | None:
    """The checkpoint to go on from, the same for all processes."""
    if group is not None:
        from hasten.distributed.checkpoint import newest as newest_of

        return newest_of(folder, identity, group)
    from hasten.training.checkpoint import newest

    return newest(folder, identity)


def _trainer(
    accelerator: Accelerator,
    epochs: int,
    steps: int | None,
    folder: Path,
    checkpoint_seconds: float,
    callbacks: Sequence[pl.Callback],
    step: Step,
    clock: StepClock | None,
    group: Group | None,
) -> pl.Trainer:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment

    from hasten.training.checkpoint import CheckpointsOfTpu, DurableCheckpoints, TimedCheckpoints
    from hasten.training.module import RandomState
    from hasten.training.scaling import LossScaling

    scaling = [LossScaling(device_of(accelerator).type)] if step.precision == "float16" else []
    return pl.Trainer(
        accelerator=LIGHTNING[accelerator],
        devices=group.size if group else 1,
        strategy=_strategy(group) if group else "auto",
        max_epochs=epochs if steps is None else -1,
        max_steps=-1 if steps is None else steps,
        callbacks=[RandomState(), *callbacks, *([] if group else [TimedCheckpoints(folder, checkpoint_seconds)])],
        # Named, so that a SLURM or torchrun environment round the process is not taken for a cluster to join.
        plugins=[
            *([] if group else [LightningEnvironment()]),
            *scaling,
            CheckpointsOfTpu() if accelerator == "tpu" else DurableCheckpoints(),
        ],
        default_root_dir=folder,
        profiler=clock,
        logger=False,
        enable_checkpointing=False,  # by Lightning itself
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _strategy(group: Group) -> pl.strategies.Strategy:
    from hasten.distributed.strategy import GroupStrategy

    return GroupStrategy(group)


def _run(
    trainer: pl.Trainer,
    learner: Learner,
    batches: BatchLoader,
    checkpoint: Path | None,
    accelerator: Accelerator,
    remedy: str,
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(learner, batches, ckpt_path=checkpoint, weights_only=True)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise PassError(f"batch normalization needs more than one value per channel in {remedy}") from error
    except RuntimeError as error:
        if accelerator == "cpu" or "deterministic" not in str(error):
            raise
        key, reason = "trainer.accelerator", " ".join(str(error).split())
        raise PassError(
            f"{key}={accelerator} can't train this so that it comes out the same again, {key}=cpu can: {reason}"
        ) from error
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit and leaves the signal ignored.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Where the garbage collector leaves alone what there is already: to go through all objects of the libraries takes
    it longer than many a step."""
    if gc.get_freeze_count():  # somebody else's, whom thawing them would surprise
        yield
        return
    gc.collect()  # what is garbage by now would stay for good, with copies of the model in it
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
            ".*dynamo_pgo force disabled.*",
            # Where a compiled forward pass has a gap, what comes after it is given tensors with gradients.
            ".*\\.grad attribute of a Tensor that is not a leaf.*",
            # A first step whose scaled gradients overflow is left out, and the learning rate still goes on.
            ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\).*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
