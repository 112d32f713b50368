"""Batch normalization over the rows of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hasten.distributed.group import Group


class SynchronizedBatchNorm(_BatchNorm):
    """Normalises by mean and variance of the rows of several processes, which may have different numbers of them.

    PyTorch's own layer of that kind refuses the CPU. In eval mode it is what it was made from.

    Attributes:
        rows_group: the processes; None for all.
    """

    rows_group: dist.ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        values = input.float()
        count = values.new_tensor([input.numel() / input.shape[1]])  # bfloat16 can't hold it from 257 on
        total = self._total(torch.cat([values.sum(axes), count]))
        mean, number = total[:-1] / total[-1], self._number(total[-1])
        if number == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        # The squares of differences, not the difference of squares, which would cancel.
        centred = values - _along_channels(mean, input)
        variance = self._total(centred.square().sum(axes)) / number
        self._follow(mean.detach(), variance.detach() * number / (number - 1))
        scaled = centred * _along_channels(torch.rsqrt(variance + self.eps), input)
        if self.affine:
            scaled = scaled * _along_channels(self.weight, input) + _along_channels(self.bias, input)
        return scaled.to(input.dtype)

    def _total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        return _Total.of(values, self.rows_group)

    def _number(self, count: Tensor) -> float:
        return float(count.detach())

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics, as `nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from 2 on."""


class UnaskedBatchNorm(SynchronizedBatchNorm):
    """The same layer where nothing is calculated and there is nobody to ask: the other processes have no rows."""

    def _total(self, values: Tensor) -> Tensor:
        return values.clone()

    def _number(self, count: Tensor) -> float:
        return 2.0


def synchronize(model: nn.Module, group: Group) -> dict[nn.Module, type[nn.Module]]:
    """Lets every batch normalization of a model see the rows of all processes; gives what each was before."""
    before: dict[nn.Module, type[nn.Module]] = {}
    if group.shape.data > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                before[module] = type(module)
                module.__class__ = SynchronizedBatchNorm
                module.rows_group = group.rows_group  # type: ignore[assignment]
    return before


def restore(before: dict[nn.Module, type[nn.Module]]) -> None:
    """Undoes `synchronize`."""
    for module, kind in before.items():
        del module.rows_group
        module.__class__ = kind


class _Total(torch.autograd.Function):
    """Sum over processes; the gradient of the sum of their losses goes to each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None

    @classmethod
    def of(cls, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total: Tensor = cls.apply(values, group)  # type: ignore[no-untyped-call]
        return total


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _along_channels(values: Tensor, input: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (input.ndim - 2))
