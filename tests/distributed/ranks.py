"""One of several processes that train each of the `CASES`: `python ranks.py FOLDER`, with torchrun's variables."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.distributed.group import joined
from hasten.tasks.classification import Classification
from hasten.training.fit import Fitted, fit

NUM_ROWS, STEPS = 160, 20


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10, bias=False),  # one before a normalization has no gradient but noise
        nn.BatchNorm1d(10),
    )


def with_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))


def with_layers() -> nn.Module:
    layers = (layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.GELU()))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), *layers, nn.Linear(128, 10))


def ddp(**knobs: object) -> Distributed:
    return Distributed(kind="ddp", devices=2, **knobs)


# name -> model, rows of a step, how it is calculated, how it is spread
CASES = {
    "batch normalization": (with_batch_norm, 32, Step(), ddp()),
    "shares of different sizes": (with_batch_norm, 27, Step(), ddp(static_graph=True)),
    "parts": (with_batch_norm, 32, Step(micro_batches=4), ddp()),
    "parts of different sizes": (with_layer_norm, 27, Step(micro_batches=3), ddp(bucket_mb=0.001)),
    "clipped": (with_layer_norm, 32, Step(clip_norm=0.05), ddp(bucket_views=False)),
    "float16": (with_layer_norm, 32, Step(), ddp(compression="float16")),
    "bfloat16": (with_layer_norm, 32, Step(), ddp(compression="bfloat16")),
    "powersgd": (with_layer_norm, 32, Step(), ddp(compression="powersgd", powersgd_start=2)),
    "averaged": (with_batch_norm, 32, Step(), ddp(average_every=3)),
    "powersgd of several buckets": (
        *(with_layers, 32, Step()),
        ddp(compression="powersgd", powersgd_start=2, bucket_mb=0.05),
    ),
}


def rows() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    targets = (images.reshape(NUM_ROWS, -1)[:, :10]).argmax(1)
    return Rows(inputs={"image": images}, targets=targets)


class Weights(pl.Callback):
    """Those of the last layer after each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *batch: object) -> None:
        self.steps.append([*learner.parameters()][-1].detach().clone())


def trained(
    name: str, folder: Path, group: object = None, seconds: float = 1e9, callbacks: tuple[pl.Callback, ...] = ()
) -> Fitted:
    make, batch_size, step, _ = CASES[name]
    torch.manual_seed(1)
    model = make()
    steps_per_epoch = NUM_ROWS // batch_size
    return fit(
        model,
        rows(),
        TrainingSettings(epochs=STEPS // steps_per_epoch, batch_size=batch_size, lr=0.01, weight_decay=0.01),
        task=Classification(),
        step=step,
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=seconds,
        progress=Silent(),
        what=name,
        key="model.training",
        group=group,
        callbacks=callbacks,
    )


def main() -> None:
    folder = Path(sys.argv[1])
    with joined(ddp()) as group:
        for name, (*_, spread) in CASES.items():
            weights = Weights()
            fitted = trained(name, folder / "resume", replace(group, spread=spread), callbacks=(weights,))
            file = folder / f"{name}-{os.environ['RANK']}.pt"
            torch.save({"weights": fitted.model.state_dict(), "curves": fitted.curves, "steps": weights.steps}, file)


if __name__ == "__main__":
    main()
