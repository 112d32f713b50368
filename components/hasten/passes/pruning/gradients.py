"""Gradients of the task's loss on training rows, by which importances are told."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.core.interfaces import Rows, Task

ROWS, BATCH = 512, 64


def mean_gradients(
    model: nn.Module, rows: Rows, task: Task, *, max_rows: int = ROWS, batch_size: int = BATCH
) -> dict[str, Tensor]:
    """Parameter -> gradient of the mean loss over the rows; see `batch_gradients`."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    num_rows = 0
    for number, gradients in batch_gradients(model, rows, task, max_rows=max_rows, batch_size=batch_size):
        num_rows += number
        for name, gradient in gradients.items():
            totals[name] += number * gradient
    return {name: total / num_rows for name, total in totals.items()}


def batch_gradients(
    model: nn.Module, rows: Rows, task: Task, *, max_rows: int = ROWS, batch_size: int = BATCH
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The gradients of the mean loss of one batch after another: number of rows, and parameter -> gradient.

    In eval mode, so that nothing is drawn at random and no statistics move, on a copy of the model. All parameters have
    a gradient, frozen ones too, and those that the loss does not reach have zeros.

    Args:
        max_rows: of the training rows so many, at equal distances, because files are often sorted by class.
    """
    probed = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = dict(probed.named_parameters())
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), max_rows)).round().astype(int)
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        inputs = {name: torch.from_numpy(values[part]) for name, values in rows.inputs.items()}
        with torch.enable_grad():
            loss = task.loss(forward(probed, inputs), torch.from_numpy(rows.targets[part]))
            gradients = torch.autograd.grad(loss, tuple(parameters.values()), materialize_grads=True, allow_unused=True)
        yield len(part), dict(zip(parameters, gradients, strict=True))
