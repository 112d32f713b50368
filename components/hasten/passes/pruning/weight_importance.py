"""How important single weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hasten.core.interfaces import Bench
from hasten.passes.pruning.gradients import batch_gradients
from hasten.passes.pruning.masks import Weight

Importance = Literal["magnitude", "taylor", "random"]
"""`magnitude`: |w| (Han et al. 2015).
`taylor`: |w dL/dw|, what the loss changes by to first order when w becomes zero (Molchanov et al. 2017, 2019). It is
averaged over batches and not taken of the mean gradient, which is near zero wherever a training has ended.
`random`: drawn evenly from [0, 1) by the bench's seed, the same at every call; the control that an importance has to
beat."""


def importances(weights: Sequence[Weight], importance: Importance, model: nn.Module, bench: Bench) -> list[Tensor]:
    """Importance of every weight, of the shapes of the weights."""
    if importance == "magnitude":
        return [each.tensor.detach().abs() for each in weights]
    if importance == "random":
        generator = torch.Generator().manual_seed(bench.seed)
        return [torch.rand(each.tensor.shape, generator=generator) for each in weights]
    return _taylor(weights, model, bench)


def _taylor(weights: Sequence[Weight], model: nn.Module, bench: Bench) -> list[Tensor]:
    totals = [torch.zeros_like(each.tensor, requires_grad=False) for each in weights]
    num_rows = 0
    for number, gradients in batch_gradients(model, bench.train, bench.task):
        num_rows += number
        for total, each in zip(totals, weights, strict=True):
            total += number * (each.tensor.detach() * gradients[each.name]).abs()
    return [total / num_rows for total in totals]
