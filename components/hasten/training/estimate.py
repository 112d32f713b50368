"""What a training will cost, from a few measured steps."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from hasten.core.interfaces import Rows
from hasten.core.sections import TrainingSettings
from hasten.training.determinism import reproducible

STEPS = 3


def training_seconds(model: nn.Module, rows: Rows, settings: TrainingSettings, *, threads: int) -> float:
    """Expected seconds of `fit`, from the fastest of a few forward and backward passes on a copy of the model."""
    batch_size = min(settings.batch_size, len(rows))
    inputs, labels = (torch.from_numpy(array[:batch_size]) for array in (rows.inputs, rows.targets))
    trial = copy.deepcopy(model).train()
    seconds = []
    with reproducible(0, threads):
        for _ in range(STEPS):
            start = time.perf_counter()
            torch.autograd.backward(nn.functional.cross_entropy(trial(inputs), labels))
            seconds.append(time.perf_counter() - start)
    return min(seconds) * settings.epochs * (len(rows) // batch_size)
