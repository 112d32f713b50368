"""What a step of hasten's training costs beside a hand-written PyTorch loop, and what each way to calculate it gives.

    .venv/bin/python benchmarks/training_loop.py overhead
    .venv/bin/python benchmarks/training_loop.py overhead --batch-size 32 --width 4 --side 8
    .venv/bin/python benchmarks/training_loop.py knobs --num-blocks 3

`overhead` trains the same CIFAR ResNet on the same rows in memory, in the same order, with AdamW (fused) and one cycle
of the learning rate, by `training.fit` and by a loop as one writes it. `knobs` trains by `training.fit` with different
sections `trainer`. Each is a process of its own with the same environment; they train in turns, a few steps at a time,
in an order that changes from round to round. Rows are noise in the shape of CIFAR-10's: what a step costs does not
depend on them. Prints Markdown: the median of a step, and the ratio to the first line, the median over rounds, with its
bootstrap interval at 95 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hasten.core.interfaces import INPUT, Rows, Silent
from hasten.core.sections import Step, TrainingSettings
from hasten.evidence.bounds import bootstrap_ratio
from hasten.evidence.process import serving_environment
from hasten.models.cifar_resnet import CifarResNet
from hasten.tasks.classification import Classification
from hasten.training.fit import fit

LR = 0.001
STEPS_PER_EPOCH = 100
WARM_UP_BLOCKS = 2
CONFIDENCE = 0.95
KNOBS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "optimizer_kernels=foreach": {"optimizer_kernels": "foreach"},
    "optimizer_kernels=for_loop": {"optimizer_kernels": "for_loop"},
    "layout=channels_last": {"layout": "channels_last"},
    "compile=default": {"compile": "default"},
    "precision=bfloat16": {"precision": "bfloat16"},
    "bfloat16, channels_last": {"precision": "bfloat16", "layout": "channels_last"},
    "bfloat16, compiled": {"precision": "bfloat16", "compile": "default"},
    "bfloat16, channels_last, compiled": {"precision": "bfloat16", "layout": "channels_last", "compile": "default"},
    "micro_batches=4": {"micro_batches": 4},
    "half of the activations": {"activation_budget_mb": "half"},
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every process trains.

    Attributes:
        side: pixels of the images, which are square.
        width: channels of the first stage; the others have twice and four times as many.
        num_blocks: residual blocks per stage.
        block_steps: steps of a turn.
        step: how hasten calculates a step; None for the loop written by hand.
    """

    batch_size: int
    side: int
    width: int
    num_blocks: int
    threads: int
    rounds: int
    block_steps: int
    step: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        return (self.rounds + WARM_UP_BLOCKS) * self.block_steps

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        widths = (self.width, 2 * self.width, 4 * self.width)
        shape = (3, self.side, self.side)
        return CifarResNet(input_shape=shape, num_outputs=10, num_blocks=self.num_blocks, widths=widths)

    def rows(self) -> Rows:
        draw, number = np.random.default_rng(0), self.batch_size * STEPS_PER_EPOCH
        inputs = draw.normal(size=(number, 3, self.side, self.side)).astype(np.float32)
        return Rows(inputs={INPUT: inputs}, targets=draw.integers(0, 10, number))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "knobs", "serve"))
    parser.add_argument("--only", nargs="*", help="lines of the table, beside the first")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    defaults = {"batch_size": 128, "side": 32, "width": 16, "num_blocks": 1, "threads": 2, "rounds": 20}
    for name, value in {**defaults, "block_steps": 10}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    what, only, work = (given.pop(name) for name in ("what", "only", "work"))
    if what == "serve":
        serve(Work(**json.loads(work)))
        return
    lines: Mapping[str, Any] = {"by hand": None, "hasten": {}} if what == "overhead" else KNOBS
    first = next(iter(lines))
    chosen = {name: step for name, step in lines.items() if only is None or name == first or name in only}
    print_table(measured({name: Work(**given, step=step) for name, step in chosen.items()}))


def measured(works: Mapping[str, Work]) -> dict[str, NDArray[np.float64]]:
    """Seconds of a step in each round, (rounds,) for each line."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with ExitStack() as running:
        turns = {name: running.enter_context(Turns(work)) for name, work in works.items()}
        rounds, block_steps = next((work.rounds, work.block_steps) for work in works.values())
        order = list(turns)
        for number in range(WARM_UP_BLOCKS + rounds):
            random.Random(number).shuffle(order)
            for name in order:
                taken = turns[name].take()
                if number >= WARM_UP_BLOCKS:
                    seconds[name].append(taken / block_steps)
    return {name: np.array(values) for name, values in seconds.items()}


class Turns:
    """A process that trains a few steps whenever it is told to, for the length of a `with` block."""

    def __init__(self, work: Work) -> None:
        command = [sys.executable, __file__, "serve", "--work", json.dumps(vars(work))]
        environment = os.environ | serving_environment(work.threads)
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def take(self) -> float:
        """Seconds of the next block of steps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("go", file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


@dataclass
class Pace(Silent):
    """Waits for its turn after every block of steps, and tells how long the block took."""

    block_steps: int
    done: int = 0
    started: float = field(default=0.0)

    def start(self, what: str, total: int) -> None:
        self._wait()

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        if self.done % self.block_steps == 0:
            print(time.perf_counter() - self.started, flush=True)
            self._wait()

    def _wait(self) -> None:
        sys.stdin.readline()
        self.started = time.perf_counter()


def serve(work: Work) -> None:
    pace = Pace(block_steps=work.block_steps)
    if work.step is None:
        by_hand(work, pace)
    else:
        by_hasten(work, pace)


def by_hasten(work: Work, pace: Pace) -> None:
    model, rows = work.model(), work.rows()
    epochs = -(-work.steps // STEPS_PER_EPOCH)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            rows,
            TrainingSettings(epochs=epochs, batch_size=work.batch_size, lr=LR, weight_decay=0.0005),
            task=Classification(),
            seed=0,
            threads=work.threads,
            folder=Path(folder),
            checkpoint_seconds=300,
            progress=pace,
            what="model",
            key="model.training",
            step=_step(work, model, rows),
        )


def _step(work: Work, model: nn.Module, rows: Rows) -> Step:
    """The line's step, with half of what the model keeps as its budget where that is asked for."""
    assert work.step is not None
    if work.step.get("activation_budget_mb") != "half":
        return Step(**work.step)
    from hasten.training.recompute import measure

    _, kept = measure(model, Step(), {INPUT: torch.from_numpy(rows.inputs[INPUT][:4])}, work.batch_size)
    return Step(**{**work.step, "activation_budget_mb": kept.total_bytes() / 2e6})


def by_hand(work: Work, pace: Pace) -> None:
    """As one writes it: rows in memory, a gather a batch, the loss summed up for a curve."""
    torch.set_num_threads(work.threads)
    model, rows = work.model().train(), work.rows()
    inputs, targets = torch.from_numpy(rows.inputs[INPUT]), torch.from_numpy(rows.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0005, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=work.steps + STEPS_PER_EPOCH)
    generator = torch.Generator().manual_seed(0)
    pace.start("model", work.steps)
    while True:
        total = 0.0
        for batch in torch.randperm(len(inputs), generator=generator).split(work.batch_size):
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            pace.advance()


def print_table(seconds: Mapping[str, NDArray[np.float64]]) -> None:
    reference = next(iter(seconds))
    print(f"| | ms a step, median | times the step of {reference} [95 %] |")
    print("|---|---|---|")
    for name, values in seconds.items():
        ratio = bootstrap_ratio(values[:, None], seconds[reference][:, None], CONFIDENCE, seed=0)
        told = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if name != reference else "1"
        print(f"| {name} | {1e3 * np.median(values):.2f} | {told} |")


if __name__ == "__main__":
    main(sys.argv[1:])
