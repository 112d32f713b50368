"""One of several processes that do one training after the other: `python jobs.py FOLDER`, with torchrun's variables.

FOLDER/jobs.json lists them: `name`, `model`, `spread`; `resume`, the folder of the checkpoints; `stop`, the step after
which it is given up, or none; and `weights`, the folder for what it ended with.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.distributed.checkpoint import write_weights
from hasten.distributed.group import Group, joined
from hasten.tasks.classification import Classification
from hasten.training.fit import Fitted, fit

NUM_ROWS, BATCH, EPOCHS = 128, 32, 6


def normalized() -> nn.Module:
    """Draws at random, and has buffers of several types."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(256, 10),
    )


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), *(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU())), nn.Linear(64, 10)
    )


MODELS = {"normalized": normalized, "plain": plain}


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """A training was given up."""


class Stop(pl.Callback):
    """Gives a training up after a step, when the checkpoint that is being written is safe."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: object) -> None:
        if trainer.global_step == self._step:
            trainer.strategy.writing.wait()
            raise Stopped


def rows() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    return Rows(inputs={"image": images}, targets=images.reshape(NUM_ROWS, -1)[:, :10].argmax(1))


def trained(job: dict, group: Group) -> Fitted:
    torch.manual_seed(1)
    return fit(
        MODELS[job["model"]](),
        rows(),
        TrainingSettings(epochs=EPOCHS, batch_size=BATCH, lr=0.01, weight_decay=0.01, patience=job.get("patience")),
        task=Classification(),
        step=Step(),
        seed=3,
        threads=1,
        folder=Path(job["resume"]),
        checkpoint_seconds=0 if job.get("stop") else 1e9,
        progress=Silent(),
        what=job["name"],
        key="model.training",
        callbacks=(Stop(job.get("stop")),),
        group=group,
    )


def do(job: dict, group: Group) -> None:
    try:
        fitted = trained(job, group)
    except Stopped:
        return
    write_weights(Path(job["weights"]), fitted.model, group)
    if group.rank == 0:
        write_json(Path(job["weights"]) / "curves.json", fitted.curves)


def main() -> None:
    asked = read_json(Path(sys.argv[1]) / "jobs.json")
    with joined(Distributed(**asked[0]["spread"])) as group:
        for job in asked:
            do(job, replace(group, spread=Distributed(**job["spread"])))


if __name__ == "__main__":
    main()
