"""One of several processes that do one training after the other: `python jobs.py FOLDER`, with torchrun's variables.

FOLDER/jobs.json lists them, each a `Job` as a mapping; what one of them ended with is written to FOLDER/NAME.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.checkpoint import write_weights
from hasten.distributed.group import Group, joined
from hasten.models.mlp import MLP
from hasten.tasks.classification import Classification
from hasten.training.fit import fit

NUM_ROWS, BATCH = 128, 32


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


def deep() -> nn.Module:
    return MLP(input_shape=(1, 8, 8), num_outputs=10, hidden=(32, 16, 32, 16))


MODELS = {"normalized": normalized, "deep": deep}
PLANS = {"deep": TensorPlan(layers={f"layers.{number}": kind for number, kind in ((1, "column"), (3, "row"))})}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training.

    Attributes:
        model: one of `MODELS`.
        spread: fields of a `Distributed`.
        start: name of a job from whose checkpoints it goes on.
        torn: a byte of their latest is altered before.
        stop: step after which it is given up.
        patience: as of `TrainingSettings`.
        epochs: of the training.
        parts: micro-batches of a step.
        pause: seconds that each step takes longer.
    """

    name: str
    model: str
    spread: Mapping[str, Any] = field(default_factory=lambda: {"kind": "ddp", "devices": 2})
    start: str | None = None
    torn: bool = False
    stop: int | None = None
    patience: int | None = None
    epochs: int = 6
    parts: int = 1
    pause: float = 0.0


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """A training was given up."""


class Stop(pl.Callback):
    """Gives a training up after a step, when the checkpoint that is being written is safe."""

    def __init__(self, step: int | None, pause: float) -> None:
        self._step, self._pause = step, pause

    def on_train_batch_end(self, trainer: pl.Trainer, *batch: object) -> None:
        time.sleep(self._pause)
        if trainer.global_step == self._step:
            trainer.strategy.writing.wait()
            raise Stopped


def rows() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    return Rows(inputs={"image": images}, targets=images.reshape(NUM_ROWS, -1)[:, :10].argmax(1))


def alter(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def do(job: Job, folder: Path, group: Group) -> None:
    """Trains, and writes weights and curves beside the checkpoints if it comes to the end."""
    here = folder / job.name
    if job.start and group.rank == 0:
        shutil.copytree(folder / job.start / "resume", here / "resume")
        if job.torn:
            *_, latest = sorted((here / "resume").iterdir(), key=lambda path: int(path.stem.removeprefix("step=")))
            alter(next(latest.glob("*.safetensors")))
    group.agreed(None)
    torch.manual_seed(1)
    try:
        fitted = fit(
            MODELS[job.model](),
            rows(),
            TrainingSettings(epochs=job.epochs, batch_size=BATCH, lr=0.01, weight_decay=0.01, patience=job.patience),
            task=Classification(),
            step=Step(micro_batches=job.parts),
            seed=3,
            threads=1,
            folder=here / "resume",
            checkpoint_seconds=0 if job.stop or job.pause else 1e9,
            progress=Silent(),
            what=job.name,
            key="model.training",
            callbacks=(Stop(job.stop, job.pause),),
            group=group,
            plan=PLANS.get(job.model, WHOLE),
        )
    except Stopped:
        return
    write_weights(here / "weights", fitted.model, group)
    if group.rank == 0:
        write_json(here / "curves.json", fitted.curves)
        write_json(here / "notes.json", fitted.notes)
        write_json(here / "job.json", asdict(job))


def main() -> None:
    folder = Path(sys.argv[1])
    asked = [Job(**job) for job in read_json(folder / "jobs.json")]
    with joined(Distributed(**asked[0].spread)) as group:
        for job in asked:
            do(job, folder, replace(group, spread=Distributed(**job.spread)))


if __name__ == "__main__":
    main()
