"""What every way of training in several processes ends with, sends and takes, beside one process.

    python benchmarks/strategies.py --sizes 1 2 4      (on Linux, where user namespaces are allowed or as root)

All train the same small transformer for 20 steps of AdamW on the same rows, with as many micro-batches, in 1, 2, 4 ...
processes of one thread, joined over gloo. `difference` is the largest of any parameter, beside one process. Each group
of processes has a network namespace of its own, so that the bytes that its loopback carries are its own: all that all
processes send, headers included, per step after the fifth. A machine with fewer cores than processes says nothing about
their speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

STEPS, SKIPPED, BATCH, LENGTH, PARTS = 20, 5, 32, 32, 4
WIDTH, LAYERS, FEEDFORWARD = 128, 4, 512

SPREADS: Mapping[int, Mapping[str, Mapping[str, Any]]] = {
    1: {
        "ddp": {"kind": "ddp"},
        "fsdp": {"kind": "fsdp", "shards": 0},
        "tensor": {"kind": "tensor", "tensor": 0},
        "pipeline, 1F1B": {"kind": "pipeline", "pipeline": 0},
    },
    2: {
        "ddp": {"kind": "ddp"},
        "fsdp": {"kind": "fsdp", "shards": 0},
        "tensor": {"kind": "tensor", "tensor": 0},
        "tensor, sequence": {"kind": "tensor", "tensor": 0, "sequence_parallel": True},
        "pipeline, GPipe": {"kind": "pipeline", "pipeline": 0, "schedule": "GPipe"},
        "pipeline, 1F1B": {"kind": "pipeline", "pipeline": 0},
        "pipeline, Interleaved1F1B": {"kind": "pipeline", "pipeline": 0, "schedule": "Interleaved1F1B"},
        "pipeline, ZBVZeroBubble": {"kind": "pipeline", "pipeline": 0, "schedule": "ZBVZeroBubble"},
    },
    4: {
        "ddp": {"kind": "ddp"},
        "fsdp": {"kind": "fsdp", "shards": 0},
        "fsdp, 2 replicas x 2 shards": {"kind": "fsdp", "shards": 2},
        "tensor": {"kind": "tensor", "tensor": 0},
        "pipeline, 1F1B": {"kind": "pipeline", "pipeline": 0},
        "2 shards x 2 tensor": {"kind": "hybrid", "shards": 0, "tensor": 2},
        "2 replicas x 2 tensor": {"kind": "hybrid", "tensor": 2},
        "2 pipeline x 2 shards": {"kind": "hybrid", "pipeline": 2, "shards": 0},
        "2 pipeline x 2 tensor": {"kind": "hybrid", "pipeline": 2, "tensor": 2},
    },
    8: {"2 pipeline x 2 shards x 2 tensor": {"kind": "hybrid", "pipeline": 2, "shards": 0, "tensor": 2}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], choices=sorted(SPREADS))
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        in_a_group(arguments.process)
        return
    with tempfile.TemporaryDirectory() as scratch:
        alone = training(Path(scratch) / "alone", None)
        print(f"{'processes':<10}{'spread':<34}{'difference':>11}{'MB a step':>11}{'ms a step':>11}")
        print(f"{1:<10}{'single':<34}{'':>11}{'':>11}{median(alone['steps_ms']):>11.1f}", flush=True)
        for size in arguments.sizes:
            for name, told in of_groups(size, Path(scratch), alone["weights"]):
                print(
                    f"{size:<10}{name:<34}{told['difference']:>11.1e}{told['megabytes']:>11.3f}{told['step_ms']:>11.1f}",
                    flush=True,
                )


def of_groups(size: int, scratch: Path, expected: Mapping[str, Any]) -> Any:
    """Name and figures of each way, as its first process tells them."""
    import torch

    folder = scratch / str(size)
    folder.mkdir()
    torch.save(expected, folder / "expected.pt")
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    command = [*agent, "--rdzv-endpoint=localhost:0", __file__, "--process", str(folder)]
    shell = f"ip link set lo up && exec {' '.join(command)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    subprocess.run(["unshare", *user, "--net", "sh", "-c", shell], env=environment, check=True)
    for line in (folder / "told.jsonl").read_text().splitlines():
        told = json.loads(line)
        yield told.pop("name"), told


def in_a_group(folder: Path) -> None:
    """One of the processes."""
    from dataclasses import replace

    import torch

    from hasten.core.sections import Distributed
    from hasten.distributed.group import joined

    size = int(os.environ["WORLD_SIZE"])
    expected = torch.load(folder / "expected.pt")
    with joined(Distributed(kind="ddp", devices=size, timeout_seconds=300)) as group:
        for number, (name, knobs) in enumerate(SPREADS[size].items()):
            spread = Distributed(devices=size, timeout_seconds=300, **knobs)
            found = training(folder / str(number), replace(group, spread=spread))
            if group.rank == 0:
                told = {
                    "name": name,
                    "difference": max(
                        (found["weights"][key].double() - whole.double()).abs().max().item()
                        for key, whole in expected.items()
                    ),
                    "megabytes": found["megabytes"],
                    "step_ms": median(found["steps_ms"]),
                }
                with (folder / "told.jsonl").open("a") as file:
                    file.write(json.dumps(told) + "\n")


def training(folder: Path, group: Any) -> dict[str, Any]:
    """Weights at the end, milliseconds of each step and megabytes that all processes sent in one."""
    import numpy as np
    import pytorch_lightning as pl
    import torch
    from omegaconf import OmegaConf

    from hasten.core.groups import conf_folder
    from hasten.core.interfaces import Rows, Silent
    from hasten.core.sections import Step, TrainingSettings
    from hasten.core.tensor_plan import TensorPlan
    from hasten.models.transformer import Transformer
    from hasten.tasks.classification import Classification
    from hasten.training.fit import fit

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.sent: list[int] = []

        def on_train_batch_end(self, *batch: Any) -> None:
            self.ends.append(perf_counter())
            self.sent.append(sent_bytes())

    torch.manual_seed(1)
    model = Transformer(
        input_shape=(LENGTH,),
        vocabulary_size=100,
        num_outputs=4,
        width=WIDTH,
        num_layers=LAYERS,
        feedforward=FEEDFORWARD,
        dropout=0.0,
    )
    for layer in model.layers:
        layer.attention.key.bias = None  # it changes no share of attention, and has no gradient but noise
    rng = np.random.default_rng(0)
    ids = rng.integers(100, size=(BATCH * 10, LENGTH))
    steps = Steps()
    config = OmegaConf.load(conf_folder() / "model/transformer.yaml")
    fitted = fit(
        model,
        Rows(inputs={"ids": ids, "mask": np.ones_like(ids)}, targets=ids[:, 0] % 4),
        TrainingSettings(epochs=STEPS // 10, batch_size=BATCH, lr=0.001, weight_decay=0.01),
        task=Classification(),
        step=Step(micro_batches=PARTS),
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=1e9,
        progress=Silent(),
        what="transformer",
        key="model.training",
        callbacks=[steps],
        group=group,
        plan=TensorPlan(layers=OmegaConf.to_container(config.tensor_plan)),
    )
    if group is not None:
        from hasten.distributed.checkpoint import read_weights, write_weights

        write_weights(folder / "weights", fitted.model, group)
        group.agreed(None)  # they are there when the first has written them
        read_weights(folder / "weights", model)
    return {
        "weights": (fitted.model if group is None else model).state_dict(),
        "steps_ms": [1e3 * (after - before) for before, after in pairwise(steps.ends[SKIPPED:])],
        "megabytes": (steps.sent[-1] - steps.sent[SKIPPED]) / (len(steps.sent) - 1 - SKIPPED) / 1e6,
    }


def sent_bytes() -> int:
    """What the loopback of this network namespace has carried so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    return 0


if __name__ == "__main__":
    main()
