"""One of several processes that train each of the `CASES` in stages: `python pipeline_ranks.py FOLDER`, by torchrun."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.distributed.group import joined
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
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(256), nn.Linear(256, 10))

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


TWO = {
    "GPipe": (Step(micro_batches=4), spread("GPipe")),
    "1F1B": (Step(micro_batches=4), spread("1F1B")),
    "1F1B, clipped": (Step(micro_batches=2, clip_norm=0.05), spread("1F1B")),
    "Interleaved1F1B": (Step(micro_batches=4), spread("Interleaved1F1B")),
    "ZBVZeroBubble": (Step(micro_batches=4), spread("ZBVZeroBubble")),
}
CASES = {2: TWO}


def rows() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    return Rows(inputs={"image": images}, targets=images.reshape(NUM_ROWS, -1)[:, :10].argmax(1))


def trained(step: Step, folder: Path, group: object = None) -> Fitted:
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
    )


def main() -> None:
    folder = Path(sys.argv[1])
    size = int(os.environ["WORLD_SIZE"])
    with joined(spread("1F1B", devices=size, pipeline=size)) as group:
        for name, (step, by) in CASES[size].items():
            fitted = trained(step, folder / "resume", replace(group, spread=by))
            weights = fitted.model.state_dict() if group.rank == 0 else {}
            torch.save({"weights": weights, "curves": fitted.curves}, folder / f"{name}-{group.rank}.pt")


if __name__ == "__main__":
    main()
