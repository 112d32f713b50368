"""What a training will cost, from a few measured steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hasten.artefacts.rows import take
from hasten.core.interfaces import Rows, Task
from hasten.core.sections import Accelerator, Step, TrainingSettings
from hasten.distributed.footprint import PerRow
from hasten.training.determinism import reproducible
from hasten.training.device import device_of, finish
from hasten.training.step import ForwardPass, parts, scaled

STEPS = 3
FEW_ROWS = 2
"""Of the smaller of two batches that are timed: batch normalization takes no less."""
TRIED_SECONDS = 2.0
"""About what all timed passes may take."""


def training_seconds(
    model: nn.Module,
    rows: Rows,
    settings: TrainingSettings,
    *,
    task: Task,
    num_rows: int,
    threads: int,
    accelerator: Accelerator = "cpu",
    step: Step = Step(),  # noqa: B008  # frozen
) -> float:
    """Expected seconds of `fit`, from the fastest of a few forward and backward passes on a copy of the model.

    Neither compilation nor activations that are calculated again are tried: an estimate must not take long.

    Args:
        rows: at least a batch of them, where there are so many; what is deferred is not timed.
        num_rows: that `fit` will train on.
        step: how each step is calculated.
    """
    batch_size, device = scaled(settings, step, len(rows)).batch_size, device_of(accelerator)
    batch = take(rows, np.arange(batch_size))
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.inputs.items()}
    targets = torch.from_numpy(batch.targets).to(device)
    trial = copy.deepcopy(model).train().to(device)
    outputs = ForwardPass(trial, replace(step, compile="none"), device.type)
    seconds = []
    with reproducible(0, threads, accelerator):
        for _ in range(STEPS):
            start = time.perf_counter()
            for part, share in parts((*inputs.values(), targets), step.micro_batches):
                loss = task.loss(outputs(dict(zip(inputs, part, strict=False))), part[-1])
                torch.autograd.backward(loss * share)
            finish(accelerator)
            seconds.append(time.perf_counter() - start)
    return min(seconds) * settings.epochs * (num_rows // batch_size)


def calculation(
    model: nn.Module, rows: Rows, *, task: Task, step: Step, threads: int, seed: int = 0
) -> tuple[PerRow, float]:
    """What one process takes for a step, from the fastest of a few that are really calculated, on the processor.

    Args:
        model: trained for these few steps.
        rows: of the largest batch that is tried, where that does not take too long.

    Returns:
        Seconds of a forward and backward pass, by the rows, and seconds of an update of all weights.
    """
    outputs = ForwardPass(model.train(), replace(step, compile="none"), "cpu")
    kernels = step.optimizer_kernels
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=kernels == "fused", foreach=kernels == "foreach")

    def passes(number: int) -> float:
        batch = take(rows, np.arange(number))
        inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
        targets = torch.from_numpy(batch.targets)
        return _fastest(lambda: torch.autograd.backward(task.loss(outputs(inputs), targets)), optimizer)

    with reproducible(seed, threads, "cpu"):
        few = min(FEW_ROWS, len(rows))
        first = passes(few)
        affordable = int(TRIED_SECONDS / STEPS / max(first, 1e-6) * few)
        many = max(few + 1, min(len(rows), affordable))
        if many > len(rows):
            return PerRow(0.0, first / few), _fastest(optimizer.step)
        seconds = PerRow.through((few, first), (many, passes(many)))
        if seconds.fixed < 0:  # larger batches are slower than in proportion
            seconds = PerRow(0.0, seconds(many) / many)
        return seconds, _fastest(optimizer.step)


def _fastest(run: Callable[[], object], optimizer: torch.optim.Optimizer | None = None) -> float:
    """Seconds of the fastest run after a first one."""
    seconds = []
    for _ in range(STEPS + 1):
        if optimizer is not None:
            optimizer.zero_grad()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def low_rank_seconds(matrices: Sequence[tuple[int, int]], rank: int, threads: int) -> float:
    """Seconds of PowerSGD's own arithmetic (Vogels et al. 2019, algorithm 1) of one step, from matrices of these sizes.

    The error of the step before is added; two products and an orthogonalisation give the thin matrices, a third product
    puts the gradient together again, of which the error is the rest.
    """
    with reproducible(0, threads, "cpu"):
        tried = [
            (torch.randn(rows, columns), torch.zeros(rows, columns), torch.randn(columns, min(rank, rows, columns)))
            for rows, columns in matrices
        ]

        def run() -> None:
            for gradient, error, right in tried:
                _compress(gradient, error, right)

        return _fastest(run) if tried else 0.0


def _compress(gradient: Tensor, error: Tensor, right: Tensor) -> None:
    gradient.add_(error)
    before = gradient.clone()
    left, _ = torch.linalg.qr(gradient @ right)
    torch.matmul(gradient.t(), left, out=right)
    torch.matmul(left, right.t(), out=gradient)
    torch.sub(before, gradient, out=error)
