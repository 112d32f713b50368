"""Steps that are slow for a known reason: whether the profiler names it, and what the move against it gives.

    .venv/bin/python benchmarks/slow_steps.py
    .venv/bin/python benchmarks/slow_steps.py --causes "huge activations" --rounds 5 --threads 1

Each cause is a training of its own that is trained as it is, with the strategies that address it, and as it is again,
in turns, each time in a process of its own; of each process the undisturbed steps after the first few count. Prints a
Markdown table: what was injected, the bottleneck with the shares of a step, the evidence, and the gain of each strategy
in samples per second (median over the rounds of the ratio, with its 95 % interval), with the bottleneck that is left.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.artefacts.rows import take
from hasten.core.interfaces import INPUT, Rows, Silent, StepFigures
from hasten.core.sections import Loader, Step, TrainingSettings
from hasten.core.trial import StepProfile
from hasten.data.transforms.decode_image import DecodeImage
from hasten.evidence.bounds import bootstrap_ratio
from hasten.hardware.probe import probe
from hasten.models.cifar_resnet import CifarResNet
from hasten.profiling.step import profile_step
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step_clock import StepClock
from hasten.training.step_operators import OperatorWatch

CLASSES = 10
WARMUP = 5
WATCHED = 3
PLAIN = Loader(cache="none", row_by_row=True, order="rows", workers=2, pin_memory=False)
"""As conf/loader/plain.yaml has it."""


class Pointwise(nn.Module):
    """Many elementwise operators on large images: next to no arithmetic for the bytes that they move and keep.

    Args:
        input_shape: (channels, height, width) of a row.
        num_outputs: outputs per row.
        width: channels of the images that are worked on.
        depth: times a scale, an addition and a ReLU.
    """

    def __init__(self, *, input_shape: Sequence[int], num_outputs: int, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.widen = nn.Conv2d(input_shape[0], width, kernel_size=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width, 1, 1)) for _ in range(depth))
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(width, 1, 1)) for _ in range(depth))
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = self.widen(images_BCHW)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            features_BCHW = torch.relu(features_BCHW * scale + shift)
        outputs_BK: Tensor = self.linear(features_BCHW.mean((2, 3)))
        return outputs_BK


class HandWrittenRecurrence(nn.Module):
    """A recurrent layer as a Python loop over its steps, each of them a few operators on a few numbers.

    Args:
        input_shape: (steps, features) of a row.
        num_outputs: outputs per row.
        width: of the state.
    """

    def __init__(self, *, input_shape: Sequence[int], num_outputs: int, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.read, self.keep = nn.Linear(input_shape[1], width), nn.Linear(width, width)
        self.gate, self.linear = nn.Linear(width, width), nn.Linear(width, num_outputs)

    def forward(self, series_BTF: Tensor) -> Tensor:
        state_BH = series_BTF.new_zeros(len(series_BTF), self.width)
        for inputs_BF in series_BTF.unbind(1):
            new_BH = torch.tanh(self.read(inputs_BF) + self.keep(state_BH))
            open_BH = torch.sigmoid(self.gate(state_BH))
            state_BH = open_BH * new_BH + (1 - open_BH) * state_BH
        outputs_BK: Tensor = self.linear(state_BH)
        return outputs_BK


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a training is run: as the cause has it, or as a strategy edits it.

    Attributes:
        told: the overrides, as a recipe would have them.
        prepared: rows have gone through the transforms once, before the training.
    """

    told: str
    step: Mapping[str, Any] = field(default_factory=dict)
    loader: Loader = field(default_factory=Loader)
    prepared: bool = True


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What makes a step slow.

    Attributes:
        expected: the bottleneck that it is.
        steps: undisturbed ones of a process.
    """

    expected: str
    model: Callable[[], nn.Module]
    rows: Callable[[int], Rows]
    batch_size: int
    plain: Way
    strategies: tuple[Way, ...]
    steps: int = 30


def images(num_rows: int, *shape: int) -> Rows:
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(num_rows, *shape)).astype(np.float32)
    return Rows(inputs={INPUT: pixels}, targets=generator.integers(0, CLASSES, num_rows))


def photographs(num_rows: int) -> Rows:
    """JPEG files of 256x256 pixels, which take about a millisecond to decode and to shrink to 32x32."""
    from PIL import Image

    generator = np.random.default_rng(0)
    files = np.empty(num_rows, object)
    for row in range(num_rows):
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files[row] = file.getvalue()
    return Rows(
        inputs={INPUT: files},
        targets=generator.integers(0, CLASSES, num_rows),
        deferred=(DecodeImage(column=INPUT, size=(32, 32)),),
    )


def convolutions(width: int, size: int) -> nn.Module:
    return CifarResNet(input_shape=(3, size, size), num_outputs=CLASSES, num_blocks=1, widths=(width,))


CAUSES = {
    "slow decode": Cause(
        expected="data",
        model=lambda: convolutions(4, 32),
        rows=photographs,
        batch_size=32,
        plain=Way(told="loader=plain", loader=PLAIN, prepared=False),
        strategies=(Way(told="loader=default"),),
    ),
    "tiny batches": Cause(
        expected="overhead",
        model=lambda: convolutions(8, 8),
        rows=lambda num_rows: images(num_rows, 3, 8, 8),
        batch_size=4,
        plain=Way(told="as it is"),
        strategies=(Way(told="trainer.batch_factor=16", step={"batch_factor": 16}),),
        steps=100,
    ),
    "huge activations": Cause(
        expected="memory",
        model=lambda: Pointwise(input_shape=(3, 64, 64), num_outputs=CLASSES),
        rows=lambda num_rows: images(num_rows, 3, 64, 64),
        batch_size=64,
        plain=Way(told="as it is"),
        strategies=(
            Way(told="trainer.micro_batches=16", step={"micro_batches": 16}),
            Way(told="trainer.compile=default", step={"compile": "default"}),
            Way(told="trainer.precision=bfloat16", step={"precision": "bfloat16"}),
        ),
        steps=12,
    ),
    "Python overhead": Cause(
        expected="overhead",
        model=lambda: HandWrittenRecurrence(input_shape=(24, 8), num_outputs=CLASSES),
        rows=lambda num_rows: images(num_rows, 24, 8),
        batch_size=32,
        plain=Way(told="trainer.optimizer_kernels=for_loop", step={"optimizer_kernels": "for_loop"}),
        strategies=(
            Way(told="trainer.optimizer_kernels=fused"),
            Way(told="trainer.compile=default", step={"compile": "default", "optimizer_kernels": "for_loop"}),
        ),
        steps=60,
    ),
}


def main() -> None:
    asked = _parser().parse_args()
    if asked.train is not None:
        print(json.dumps(train(CAUSES[asked.train], asked.way, asked.threads)))
        return
    roofline = probe(asked.threads).to_dict()
    print(f"{asked.rounds} rounds, {asked.threads} threads\n")
    print("| injected | expected | diagnosis | shares of a step | strategy | gain | left |")
    print("|---|---|---|---|---|---|---|")
    told = []
    for name in asked.causes:
        cause = CAUSES[name]
        rounds = [
            [_trained(name, way, asked.threads) for way in range(len(cause.strategies) + 1)]
            for _ in range(asked.rounds)
        ]
        plain, *others = zip(*rounds, strict=True)
        found = _profile(plain, roofline)
        print(f"| {name} | {cause.expected} | {found.bottleneck} | {_shares(found)} |  |  |  |")
        told.append((name, found.evidence))
        for way, runs in zip(cause.strategies, others, strict=True):
            left = _profile(runs, roofline)
            print(f"|  |  |  |  | {way.told} | {_gain(runs, plain)} | {left.bottleneck} |", flush=True)
    for name, evidence in told:
        print(f"\n{name}:", *(f"- {sentence}" for sentence in evidence), sep="\n")


def _shares(found: StepProfile) -> str:
    ranked = sorted(found.shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)


def _gain(runs: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    reference, candidate = ([_row_ms(run) for run in side] for side in (plain, runs))
    gain = bootstrap_ratio(reference, candidate, 0.95, seed=0)
    return f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"


def _row_ms(run: Mapping[str, Any]) -> list[float]:
    """Milliseconds of a row, in each step."""
    return [sum(step) / run["batch_size"] for step in run["phases_ms"]]


def _profile(runs: Sequence[Mapping[str, Any]], roofline: Mapping[str, Any]) -> StepProfile:
    """Of the run with the median step, so that all figures are of one process."""
    run = sorted(runs, key=lambda each: float(np.median(_row_ms(each))))[len(runs) // 2]
    return profile_step(
        phases_ms=np.array(run["phases_ms"]),
        page_faults=np.array(run["page_faults"]),
        delays_ms=np.array(run["delays_ms"]) if run["workers"] else None,
        figures=StepFigures.from_dict(run["figures"]),
        roofline=roofline,
    )


def _trained(cause: str, way: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train", cause, "--way", str(way), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(cause: Cause, number: int, threads: int) -> dict[str, Any]:
    """Trains for one epoch that is as long as it has to be; of its steps the undisturbed ones are told."""
    way = (cause.plain, *cause.strategies)[number]
    step = Step(**way.step)
    batch_size, first = cause.batch_size * step.batch_factor, WARMUP + cause.steps
    num_steps = first + WATCHED + 2
    # A few rows again and again are as good as many, and are made faster.
    rows = cause.rows(4 * cause.batch_size)
    if way.prepared:
        rows = take(rows, np.arange(len(rows)))
    rows = _repeated(rows, batch_size * num_steps)
    clock = StepClock()
    watch = OperatorWatch(clock, first=first, steps=WATCHED)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            cause.model(),
            rows,
            TrainingSettings(epochs=1, batch_size=cause.batch_size, lr=0.001, weight_decay=0.0),
            task=Classification(),
            seed=0,
            threads=threads,
            folder=Path(folder),
            checkpoint_seconds=3600,
            progress=Silent(),
            what="model",
            key="model.training",
            step=step,
            loader=way.loader,
            clock=clock,
            callbacks=[watch],
        )
    return {
        "batch_size": batch_size,
        "workers": way.loader.workers,
        "phases_ms": clock.phases_ms[WARMUP:first].tolist(),
        "page_faults": clock.page_faults[WARMUP:first].tolist(),
        "delays_ms": clock.delays_ms[WARMUP:first].tolist(),
        "figures": watch.figures.to_dict(),
    }


def _repeated(rows: Rows, number: int) -> Rows:
    numbers = np.arange(number) % len(rows)
    inputs = {name: values[numbers] for name, values in rows.inputs.items()}
    return Rows(inputs=inputs, targets=rows.targets[numbers], deferred=rows.deferred)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--causes", nargs="+", choices=tuple(CAUSES), default=tuple(CAUSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", choices=tuple(CAUSES), help=argparse.SUPPRESS)
    parser.add_argument("--way", type=int, default=0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
