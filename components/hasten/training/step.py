"""How a model's forward pass is calculated while it trains, and on how many rows at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hasten.artefacts.module import forward
from hasten.core.errors import PassError, first_line
from hasten.core.sections import Compilation, Step, TrainingSettings
from hasten.core.tensor_plan import TensorPlan
from hasten.distributed.data_parallel import Wrapped, averaged
from hasten.distributed.group import Group
from hasten.distributed.sharded import adding_up, sharded
from hasten.distributed.tensor import divide

_HALF: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class ForwardPass:
    """A model's forward pass as a `Step` wants it; what surrounds it stays in float32.

    The model itself is left as it is but for the layout of its weights, so that its state dict, its hooks and its
    forward pass in eval mode are those of the plain module.

    Args:
        model: in training mode.
        device: type of the device that the model will be on, such as `cpu`.
    """

    def __init__(self, model: nn.Module, step: Step, device: str) -> None:
        self._model, self._step, self._device = model, step, device
        self._run: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = forward
        if step.layout == "channels_last":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if step.compile != "none":
            self._run = _compiled(step.compile)
        self._averaged: DistributedDataParallel | None = None
        self._adding_up: Callable[[], AbstractContextManager[object]] = nullcontext

    def spread(self, group: Group, plan: TensorPlan, rows: Mapping[str, Tensor]) -> None:
        """Divides the model in place among the processes of a group, which then learn together what they share; nothing
        where they take steps of their own.

        Args:
            plan, rows: as of `distributed.tensor.divide`.
        """
        if group.spread.local_steps:
            return
        if group.spread.kind == "ddp":
            self._averaged = averaged(Wrapped(self._model, self._run), group)
            self._adding_up = self._averaged.no_sync
            return
        if group.shape.tensor > 1:
            divide(self._model, plan, group, rows)
        if group.shape.data > 1:
            self._adding_up = partial(adding_up, sharded(self._model, group), group)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Outputs in float32."""
        with autocast(self._step, self._device):
            outputs: Tensor = (
                self._run(self._model, self._laid_out(inputs))
                if self._averaged is None
                else self._averaged(dict(self._laid_out(inputs)))
            )
        return outputs.float()

    @property
    def averaged(self) -> DistributedDataParallel | None:
        """Where gradients are averaged over processes; None where they are not."""
        return self._averaged

    def communicating(self, wanted: bool) -> AbstractContextManager[object]:
        """Forward and backward passes after which gradients are averaged, or only add up in this process."""
        return nullcontext() if wanted else self._adding_up()

    def plain(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the model as it will be used: in float32 and not compiled."""
        return forward(self._model, self._laid_out(inputs))

    def _laid_out(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: laid_out(self._step, values) for name, values in inputs.items()}


def autocast(step: Step, device: str) -> AbstractContextManager[object]:
    """Where a forward pass is calculated, on a device of that type."""
    dtype = _HALF.get(step.precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def laid_out(step: Step, values: Tensor) -> Tensor:
    """What a forward pass takes (B, ...), in the layout of the step."""
    if step.layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values


def _compiled(mode: Compilation) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        from torch._inductor import compile_fx, list_mode_options  # noqa: F401  # imported by compiling anyway

    # Kernels chosen by stopwatch would add in another order in the next process. Each size of a batch is compiled for
    # itself: a step has at most two, and code for any size is slower.
    options = {**list_mode_options(mode), "deterministic": True}
    compiled: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = torch.compile(
        forward, options=options, dynamic=False
    )
    return compiled


@contextmanager
def compiling(step: Step, what: str) -> Iterator[None]:
    """Where compiled code runs; afterwards PyTorch has forgotten it, so that many trainings in one process don't reach
    the number of versions from which it gives up compiling.

    Args:
        what: is trained, for the error.

    Raises:
        PassError: the compiler can't compile the model.
    """
    if step.compile == "none":
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    torch._dynamo.reset()
    try:
        yield
    except TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))
        raise PassError(
            f"trainer.compile={step.compile} can't compile {what}, trainer.compile=none runs it as it is: {reason}"
        ) from error
    finally:
        torch._dynamo.reset()


def scaled(settings: TrainingSettings, step: Step, num_rows: int) -> TrainingSettings:
    """The settings with the rows of a step times its `batch_factor`, and the learning rate as `lr_scaling` wants it.

    Where there are fewer rows, all of them are one step, and the learning rate is scaled by what is really taken.

    Args:
        num_rows: that there are to train on.
    """
    before = min(settings.batch_size, num_rows)
    batch_size = min(settings.batch_size * step.batch_factor, num_rows)
    factor = batch_size / before
    lr = settings.lr * {"none": 1.0, "sqrt": math.sqrt(factor), "linear": factor}[step.lr_scaling]
    return replace(settings, batch_size=batch_size, lr=lr)


def parts(tensors: Sequence[Tensor], micro_batches: int) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """The rows of a batch in so many parts, as equal as can be, each with its share of the rows.

    Args:
        tensors: (B, ...) each.
        micro_batches: parts; of fewer rows each is one.
    """
    num_rows = len(tensors[0])
    pieces = (tensor.tensor_split(min(micro_batches, num_rows)) for tensor in tensors)
    for piece in zip(*pieces, strict=True):
        yield piece, len(piece[0]) / num_rows
