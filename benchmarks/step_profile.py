"""Whether the clock of a training's steps tells the truth, and what it costs.

    .venv/bin/python benchmarks/step_profile.py
    .venv/bin/python benchmarks/step_profile.py --models resnet8 --rounds 9 --threads 2

Trains with and without the clock, in turns, each time in a process of its own. Prints a Markdown table: the step as a
clock of its own around the whole loop has it, how far from that the phases are in sum (of all rounds the furthest),
what the clock costs (median over the rounds of the ratio of median steps, with its 95 % interval), and where the step
goes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import nn

from hasten.core.interfaces import INPUT, Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.core.trial import PHASES
from hasten.evidence.bounds import bootstrap_ratio
from hasten.models.cifar_resnet import CifarResNet
from hasten.models.mlp import MLP
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step_clock import StepClock

STEPS = {"resnet8": 40, "mlp": 1200}
BATCH_SIZE = {"resnet8": 128, "mlp": 16}
SHAPE = {"resnet8": (3, 32, 32), "mlp": (32,)}
WARMUP = 10
CLASSES = 10


class Wall(pl.Callback):  # type: ignore[misc]
    """A clock that knows nothing of phases: when the loop began and ended, and when each step ended."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.marks: list[float] = []

    def on_train_epoch_start(self, *arguments: Any) -> None:
        self.began = self.began or perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.marks.append(perf_counter())

    def on_train_end(self, *arguments: Any) -> None:
        self.ended = perf_counter()


def main() -> None:
    asked = _parser().parse_args()
    if asked.train is not None:
        print(json.dumps(train(asked.train, asked.clock, asked.threads)))
        return
    print(f"{asked.rounds} rounds, {asked.threads} threads\n")
    print(f"| model | step, ms | sum of phases | cost of the clock | {' | '.join(PHASES)} |")
    print(f"|---|---|---|---|{'---|' * len(PHASES)}")
    for model in asked.models:
        rounds = [_round(model, asked, clock_first=bool(number % 2)) for number in range(asked.rounds)]
        print(_line(model, rounds), flush=True)


def _line(model: str, rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    off = max((timed["phases_ms"] / timed["wall_ms"] - 1 for timed, _ in rounds), key=abs)
    timed, plain = ([each["steps_ms"] for each in side] for side in zip(*rounds, strict=True))
    cost = bootstrap_ratio(timed, plain, 0.95, seed=0)
    step = np.median(plain)
    phases = np.median([each["mean_phases_ms"] for each, _ in rounds], axis=0)
    percent = f"{100 * (cost.value - 1):+.1f} % [{100 * (cost.low - 1):+.1f}, {100 * (cost.high - 1):+.1f}]"
    return f"| {model} | {step:.2f} | {100 * off:+.2f} % | {percent} | {' | '.join(f'{ms:.3f}' for ms in phases)} |"


def _round(model: str, asked: argparse.Namespace, *, clock_first: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """With the clock and without it, in either order, so that a machine that grows slower favours neither."""
    found = {clock: _trained(model, clock, asked) for clock in (clock_first, not clock_first)}
    return found[True], found[False]


def _trained(model: str, clock: bool, asked: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train", model, "--threads", str(asked.threads)]
    done = subprocess.run([*command, *(["--clock"] if clock else [])], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(model: str, with_clock: bool, threads: int) -> dict[str, Any]:
    """Milliseconds of the loop, of its steps once it is warm, and with the clock of its phases."""
    generator, shape = np.random.default_rng(0), SHAPE[model]
    num_rows = STEPS[model] * BATCH_SIZE[model]
    rows = Rows(
        inputs={INPUT: generator.normal(size=(num_rows, *shape)).astype(np.float32)},
        targets=generator.integers(0, CLASSES, num_rows),
    )
    clock, wall = StepClock() if with_clock else None, Wall()
    with tempfile.TemporaryDirectory() as folder:
        fit(
            _model(model),
            rows,
            TrainingSettings(epochs=1, batch_size=BATCH_SIZE[model], lr=0.001, weight_decay=0.0),
            task=Classification(),
            seed=0,
            threads=threads,
            folder=Path(folder),
            checkpoint_seconds=3600,
            progress=Silent(),
            what=model,
            key="model.training",
            clock=clock,
            callbacks=[wall],
        )
    found: dict[str, Any] = {
        "wall_ms": 1e3 * (wall.ended - wall.began),
        "steps_ms": (1e3 * np.diff(wall.marks)[WARMUP:]).tolist(),
    }
    if clock is not None:
        phases_ms = clock.phases_ms
        found |= {"phases_ms": phases_ms.sum(), "mean_phases_ms": phases_ms[WARMUP:].mean(axis=0).tolist()}
    return found


def _model(name: str) -> nn.Module:
    if name == "resnet8":
        return CifarResNet(input_shape=SHAPE[name], num_outputs=CLASSES, num_blocks=1)
    return MLP(input_shape=SHAPE[name], num_outputs=CLASSES, hidden=(64, 64))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--clock", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
