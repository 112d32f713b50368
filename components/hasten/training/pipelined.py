"""A training whose model is divided into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hasten.artefacts.wrapper import inner
from hasten.core.errors import PassError
from hasten.core.interfaces import Distillation
from hasten.core.sections import Step, TrainingSettings
from hasten.core.tensor_plan import TensorPlan
from hasten.training.step import autocast, laid_out

if TYPE_CHECKING:
    from hasten.distributed.group import Group
    from hasten.distributed.pipeline import Pipeline


def micro_rows(settings: TrainingSettings, step: Step, group: Group, key: str) -> int:
    """Rows of a micro-batch in a process.

    Args:
        settings: with the batch size of a whole step.
        key: of the config section with the settings.

    Raises:
        PassError: they would not all be of the same number, as a pipeline's have to be.
    """
    rows, rest = divmod(settings.batch_size, group.shape.data * step.micro_batches)
    if rest or not rows:
        others = f" x {group.shape.data} processes with other rows" if group.shape.data > 1 else ""
        raise PassError(
            f"a pipeline needs equal micro-batches, and {settings.batch_size} rows of a step ({key}.batch_size) can't "
            f"be divided by trainer.micro_batches={step.micro_batches}{others}"
        )
    return rows


def refuse(model: nn.Module, settings: TrainingSettings, loss: Distillation | None, key: str) -> None:
    """Refuses what no stage of a pipeline could do alone.

    Args:
        key: of the config section with the settings.

    Raises:
        PassError: rows are held out, layers are compared, or weights are held at zero.
    """
    if inner(model) is not model:
        raise PassError(
            "distributed.pipeline can't divide a model whose weights are held at zero while it trains: "
            "distributed=fsdp can"
        )
    if settings.patience is not None:
        raise PassError(
            f"{key}.patience={settings.patience} needs the whole model to judge held-out rows, and a pipeline divides "
            f"it: {key}.patience=null"
        )
    if loss is not None and any(loss.layers):
        raise PassError(
            "distillation.student_layers can't be followed through a pipeline, whose processes have some layers each"
        )


def pipelined(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    step: Step,
    group: Group,
    *,
    plan: TensorPlan,
    tried: Mapping[str, Tensor],
    folder: Path,
    identity: str,
    seed: int,
    what: str,
) -> Pipeline:
    """Cuts a model in training mode and takes this process' stages of it.

    Args:
        inputs: of a micro-batch.
        plan, tried: as of `distributed.tensor.divide`.
        folder: of the checkpoints.
        identity: of the training.
        seed: of random changes of inputs.
        what: is trained, for errors.

    Raises:
        PassError: on all processes: the model can't be cut into so many stages.
        ConfigError: the plan does not fit the model.
    """
    from hasten.distributed.pipeline import Pipeline, agreed_plan
    from hasten.distributed.tensor import divide

    def inside() -> AbstractContextManager[object]:
        return autocast(step, "cpu")

    cut = agreed_plan(model, inputs, group, folder=folder, identity=identity, inside=inside, plan=plan, what=what)
    if group.shape.tensor > 1:
        divide(model, plan, group, tried)
    return Pipeline(
        model,
        list(inputs),
        cut,
        group,
        micro_batches=step.micro_batches,
        inside=inside,
        laid_out=lambda values: laid_out(step, values),
        seed=seed,
    )
