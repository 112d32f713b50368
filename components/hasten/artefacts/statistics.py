"""Batch normalization after what comes before it has changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hasten.artefacts.module import forward
from hasten.core.interfaces import Columns


def estimate_statistics(model: nn.Module, inputs: Columns, batch_size: int = 256) -> None:
    """Sets the means and variances of batch normalization to the averages over the rows, in place.

    Everything else is in eval mode meanwhile. What was removed or quantized upstream shifts the input of every
    normalization away from the statistics that it remembers, and the moving averages of a short training lag behind.
    Training does not read them, so once, after it, is enough.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    with torch.no_grad():
        # Equal batches, so that the average over batches is the one over rows, and none has a single row.
        for batch in _batches(inputs, batch_size) if layers else ():
            forward(model, batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _batches(inputs: Columns, size: int) -> Iterator[dict[str, Tensor]]:
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    number = max(1, round(len(next(iter(tensors.values()))) / size))
    for parts in zip(*(tensor.tensor_split(number) for tensor in tensors.values()), strict=True):
        yield dict(zip(tensors, parts, strict=True))
