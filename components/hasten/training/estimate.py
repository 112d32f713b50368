"""What a training will cost, from a few measured steps."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import nn

from hasten.artefacts.module import forward
from hasten.artefacts.rows import take
from hasten.core.interfaces import Rows, Task
from hasten.core.sections import Accelerator, TrainingSettings
from hasten.training.determinism import reproducible
from hasten.training.device import device_of, finish

STEPS = 3


def training_seconds(
    model: nn.Module,
    rows: Rows,
    settings: TrainingSettings,
    *,
    task: Task,
    num_rows: int,
    threads: int,
    accelerator: Accelerator = "cpu",
) -> float:
    """Expected seconds of `fit`, from the fastest of a few forward and backward passes on a copy of the model.

    Args:
        rows: at least a batch of them, where there are so many; what is deferred is not timed.
        num_rows: that `fit` will train on.
    """
    batch_size, device = min(settings.batch_size, len(rows)), device_of(accelerator)
    batch = take(rows, np.arange(batch_size))
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.inputs.items()}
    targets = torch.from_numpy(batch.targets).to(device)
    trial = copy.deepcopy(model).train().to(device)
    seconds = []
    with reproducible(0, threads, accelerator):
        for _ in range(STEPS):
            start = time.perf_counter()
            torch.autograd.backward(task.loss(forward(trial, inputs), targets))
            finish(accelerator)
            seconds.append(time.perf_counter() - start)
    return min(seconds) * settings.epochs * (num_rows // batch_size)
