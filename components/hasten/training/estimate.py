"""What a training will cost, from a few measured steps."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from hasten.artefacts.rows import take
from hasten.core.interfaces import Rows, Task
from hasten.core.sections import Accelerator, Step, TrainingSettings
from hasten.training.determinism import reproducible
from hasten.training.device import device_of, finish
from hasten.training.step import ForwardPass, parts, scaled

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
