"""Estimated memory of each process of a training beside what it really takes.

    python benchmarks/distributed_memory.py

Three models are trained for a few steps, each spread in several ways over processes of its own. What is measured is the
most anonymous memory (RssAnon and RssShmem in /proc, looked at every millisecond) that a process has from when it is
given its model to the last step, less what it had before: with its libraries loaded, its rows read and a tiny model
trained. glibc is told to give every buffer from 64 KiB on back to the system (MALLOC_MMAP_THRESHOLD_), so that memory
which is free is not counted. The process with the highest peak is compared with the highest estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LENGTH, WORDS = 64, 2000
MEGABYTE = 1e6
STEPS = 4


def mlp() -> nn.Module:
    from hasten.models.mlp import MLP

    return MLP(input_shape=(64,), num_outputs=10, hidden=(2048, 2048, 2048, 2048))


def cnn() -> nn.Module:
    from hasten.models.resnet import ResNet

    return ResNet(input_shape=(3, 16, 16), num_outputs=10, widths=(64, 128, 256), num_blocks=3)


def transformer() -> nn.Module:
    from hasten.models.transformer import Transformer

    return Transformer(
        input_shape=(LENGTH,),
        vocabulary_size=WORDS,
        num_outputs=10,
        width=256,
        num_heads=4,
        num_layers=6,
        feedforward=1024,
    )


MODELS: dict[str, tuple[Callable[[], Any], tuple[tuple[str, tuple[int, ...], str], ...], int]] = {
    "mlp": (mlp, (("input", (64,), "float32"),), 256),
    "cnn": (cnn, (("input", (3, 16, 16), "float32"),), 32),
    "transformer": (transformer, (("ids", (LENGTH,), "int64"), ("mask", (LENGTH,), "int64")), 16),
}
"""Name -> model, its inputs, and rows of a step."""

SPREADS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single", "devices": 1},
    "ddp": {"kind": "ddp", "devices": 2},
    "fsdp": {"kind": "fsdp", "devices": 2, "shards": 0},
    "tensor": {"kind": "tensor", "devices": 2, "tensor": 0},
    "pipeline": {"kind": "pipeline", "devices": 2, "pipeline": 0},
    "ddp bfloat16": {"kind": "ddp", "devices": 2, "compression": "bfloat16"},
    "ddp powersgd": {"kind": "ddp", "devices": 2, "compression": "powersgd", "powersgd_start": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--spreads", nargs="*", default=list(SPREADS))
    parser.add_argument("--kernels", default="fused", help="trainer.optimizer_kernels")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        trained(json.loads(arguments.process))
        return
    print(
        f"{'model':<13}{'spread':<15}{'estimate MB':>12}{'measured MB':>13}{'difference':>12}"
        "   measured by rank; estimate"
    )
    for model in arguments.models:
        for spread in arguments.spreads:
            estimate = estimated(model, spread, arguments.kernels)
            peaks = measured(model, spread, arguments.kernels)
            ratio = estimate.peak / max(peaks) - 1
            print(
                f"{model:<13}{spread:<15}{estimate.peak / MEGABYTE:>12.1f}{max(peaks) / MEGABYTE:>13.1f}{ratio:>+12.1%}"
                f"   {', '.join(f'{peak / MEGABYTE:.0f}' for peak in peaks)}; {told(estimate)}",
                flush=True,
            )


def estimated(model: str, name: str, kernels: str) -> Any:
    import torch

    from hasten.core.interfaces import Input
    from hasten.core.sections import Distributed
    from hasten.distributed.memory import needed
    from hasten.tasks.classification import Classification
    from hasten.training.footprint import footprint

    make, inputs, rows = MODELS[model]
    spread = Distributed(**SPREADS[name])
    step = step_of(spread, kernels)
    own = rows // spread.mesh(spread.devices).data // step.micro_batches
    found = footprint(
        make,
        [Input(name=name, shape=shape, dtype=dtype) for name, shape, dtype in inputs],
        torch.zeros(1, dtype=torch.long),
        Classification(),
        step,
        rows=(own // 2, own),
        alone=spread.mesh(spread.devices).data == 1,
        plan=plan_of(model),
        tensor=spread.mesh(spread.devices).tensor,
    )
    return needed(found, spread, rows, step)


def step_of(spread: Any, kernels: str) -> Any:
    """With enough micro-batches for a pipeline."""
    from hasten.core.sections import Step

    parts = 4 if spread is not None and spread.kind == "pipeline" else 1
    return Step(optimizer_kernels=kernels, micro_batches=parts)


def plan_of(model: str) -> Any:
    """As conf/model/*.yaml has it."""
    from omegaconf import OmegaConf

    from hasten.core.groups import conf_folder
    from hasten.core.tensor_plan import TensorPlan

    file = conf_folder() / "model" / f"{'resnet' if model == 'cnn' else model}.yaml"
    return TensorPlan(layers=dict(OmegaConf.load(file).tensor_plan or {}))


def told(estimate: Any) -> str:
    return ", ".join(f"{name} {value / MEGABYTE:.0f}" for name, value in asdict(estimate).items())


def measured(model: str, name: str, kernels: str) -> list[float]:
    """Bytes of each process at its peak."""
    spread = SPREADS[name]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        processes = []
        for rank in range(spread["devices"]):
            told = {"model": model, "spread": spread, "folder": folder, "kernels": kernels}
            environment = {
                **os.environ,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(spread["devices"]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": str(spread["devices"]),
                "TORCHELASTIC_RUN_ID": "memory",
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            }
            words = [sys.executable, __file__, "--process", json.dumps(told)]
            processes.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
        bases: dict[int, float] = {}
        peaks: dict[int, float] = {}
        while any(process.poll() is None for process in processes):
            for rank, process in enumerate(processes):
                here = anonymous(process.pid)
                if rank not in bases and (Path(folder) / f"base-{rank}").exists():
                    bases[rank] = here
                if rank in bases and not (Path(folder) / f"end-{rank}").exists():
                    peaks[rank] = max(peaks.get(rank, 0.0), here)
            time.sleep(0.001)
        for process in processes:
            if process.returncode:
                sys.exit(process.stderr.read() if process.stderr else "a process failed")
        return [peaks[rank] - bases[rank] for rank in sorted(peaks)]


def anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def trained(told: dict[str, Any]) -> None:
    """One of the processes."""
    from contextlib import nullcontext

    import numpy as np
    import pytorch_lightning as pl
    import torch
    from torch import nn

    from hasten.core.interfaces import Rows, Silent
    from hasten.core.sections import Distributed, TrainingSettings
    from hasten.core.tensor_plan import WHOLE
    from hasten.distributed.group import joined
    from hasten.tasks.classification import Classification
    from hasten.training.fit import fit

    make, inputs, batch_size = MODELS[told["model"]]
    rank, folder = int(os.environ["RANK"]), Path(told["folder"])
    spread = Distributed(**told["spread"])
    generator = np.random.default_rng(0)

    class Ends(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: pl.Trainer, *batch: Any) -> None:
            if trainer.global_step == STEPS:
                (folder / f"end-{rank}").touch()
                time.sleep(0.1)

    def rows_of(inputs: Any, number: int) -> Rows:
        values = {
            name: generator.random((number, *shape), dtype=np.float32)
            if dtype == "float32"
            else np.ones((number, *shape), np.int64)
            for name, shape, dtype in inputs
        }
        return Rows(inputs=values, targets=generator.integers(10, size=number))

    def train(model: nn.Module, rows: Rows, batch_size: int, where: Path, group: Any, callbacks: Any) -> None:
        fit(
            model,
            rows,
            TrainingSettings(epochs=1, batch_size=batch_size, lr=0.001, weight_decay=0.01),
            task=Classification(),
            seed=0,
            threads=1,
            folder=where,
            checkpoint_seconds=1e9,
            progress=Silent(),
            what="model",
            key="model.training",
            step=step_of(spread if group else None, told["kernels"]),
            steps=STEPS,
            callbacks=callbacks,
            group=group,
            plan=plan if group else WHOLE,
        )

    plan = plan_of(told["model"])
    with joined(spread) if spread.kind != "single" else nullcontext() as group:
        rows = rows_of(inputs, 2 * batch_size)
        tiny = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
        train(tiny, rows_of((("input", (8,), "float32"),), 8), 8, folder / "tiny", None, [])
        time.sleep(0.05)
        (folder / f"base-{rank}").touch()
        time.sleep(0.1)
        torch.manual_seed(0)
        train(make(), rows, batch_size, folder / "resume", group, [Ends()])


if __name__ == "__main__":
    main()
