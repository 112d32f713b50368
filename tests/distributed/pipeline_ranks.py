"""One of several processes that train each of the `CASES` in stages: `python pipeline_ranks.py FOLDER`, by torchrun."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.files import write_json
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.core.tensor_plan import TensorPlan
from hasten.distributed.checkpoint import write_weights
from hasten.distributed.group import Group, joined
from hasten.passes.distillation.soft_labels import SoftLabels
from hasten.tasks.classification import Classification
from hasten.training.fit import Fitted, fit

NUM_ROWS, STEPS, ROWS = 160, 20, 32


class Uneven(nn.Module):
    """Convolutions of very different cost, with normalizations of both kinds and a shortcut over most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(Bottleneck(width) for width in (2, 32, 4, 8))
        layers = (nn.Flatten(), nn.LayerNorm(256), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
        self.head = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        first = self.act(self.norm(self.stem(image)))
        features = first
        for block in self.blocks:
            features = block(features)
        outputs: Tensor = self.head(features + first)
        return outputs


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, 4, 1)

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = features + self.outer(torch.relu(self.norm(self.inner(features))))
        return outputs


def spread(schedule: str, **knobs: object) -> Distributed:
    kind = "hybrid" if knobs else "pipeline"
    return Distributed(kind=kind, schedule=schedule, **({"devices": 2, "pipeline": 0} | knobs))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training.

    Attributes:
        taught: by stored answers of a teacher.
    """

    spread: Distributed
    step: Step
    taught: bool = False


def case(
    schedule: str, micro_batches: int = 4, *, taught: bool = False, step: Mapping[str, Any] = {}, **knobs: Any
) -> Case:
    return Case(spread=spread(schedule, **knobs), step=Step(micro_batches=micro_batches, **step), taught=taught)


CLIPPED = {"clip_norm": 0.05}
CASES = {
    2: {
        "GPipe": case("GPipe"),
        "1F1B, clipped": case("1F1B", 2, step=CLIPPED),
        "Interleaved1F1B, taught": case("Interleaved1F1B", taught=True),
        "ZBVZeroBubble": case("ZBVZeroBubble"),
        "ZBVZeroBubble, bfloat16": case("ZBVZeroBubble", step={"precision": "bfloat16", "layout": "channels_last"}),
    },
    4: {
        "four stages, GPipe": case("GPipe", devices=4),
        "four stages, 1F1B, clipped": case("1F1B", step=CLIPPED, devices=4),
        "eight stages, Interleaved1F1B": case("Interleaved1F1B", devices=4),
        "eight stages, ZBVZeroBubble": case("ZBVZeroBubble", 8, devices=4),
        "LoopedBFS x replicas": case("LoopedBFS", devices=4, pipeline=2),
        "InterleavedZeroBubble x replicas": case("InterleavedZeroBubble", devices=4, pipeline=2),
        "ZBVZeroBubble x replicas": case("ZBVZeroBubble", devices=4, pipeline=2),
        "DualPipeV x replicas, clipped": case("DualPipeV", step=CLIPPED, devices=4, pipeline=2, bucket_mb=0.001),
        "1F1B x replicas": case("1F1B", devices=4, pipeline=2),
        "1F1B x shards, clipped": case("1F1B", step=CLIPPED, devices=4, pipeline=2, shards=2),
        "Interleaved1F1B x shards": case("Interleaved1F1B", devices=4, pipeline=2, shards=2),
        "1F1B x tensor, clipped": case("1F1B", step=CLIPPED, devices=4, pipeline=2, tensor=2),
        "ZBVZeroBubble x tensor": case("ZBVZeroBubble", devices=4, pipeline=2, tensor=2),
    },
    8: {
        "1F1B x replicas x tensor": case("1F1B", devices=8, pipeline=2, tensor=2),
        "1F1B x shards x tensor, clipped": case("1F1B", step=CLIPPED, devices=8, pipeline=2, tensor=2, shards=2),
    },
}
"""Number of processes -> name -> how they train."""


def rows() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    return Rows(inputs={"image": images}, targets=images.reshape(NUM_ROWS, -1)[:, :10].argmax(1))


def trained(step: Step, taught: bool, folder: Path, group: Group | None = None) -> Fitted:
    answers = np.random.default_rng(1).standard_normal((NUM_ROWS, 10)).astype(np.float32)
    torch.manual_seed(1)
    return fit(
        Uneven(),
        rows(),
        TrainingSettings(epochs=STEPS * ROWS // NUM_ROWS, batch_size=ROWS, lr=0.01, weight_decay=0.01),
        task=Classification(),
        step=step,
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=1e9,
        progress=Silent(),
        what="the model",
        key="model.training",
        group=group,
        loss=SoftLabels() if taught else None,
        teacher_outputs=answers if taught else None,
        plan=TensorPlan(layers={"head.2": "column", "head.4": "row"}),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    size = int(os.environ["WORLD_SIZE"])
    with joined(spread("1F1B", devices=size, pipeline=size)) as group:
        for name, its in CASES[size].items():
            fitted = trained(its.step, its.taught, folder / "resume", replace(group, spread=its.spread))
            write_weights(folder / name, fitted.model, group)
            write_json(folder / f"{name}-{group.rank}.json", fitted.curves)


if __name__ == "__main__":
    main()
