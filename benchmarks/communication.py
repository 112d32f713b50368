"""What compressed gradients gain where the network between two hosts is the bottleneck.

    python benchmarks/communication.py --mbit 200 --seeds 3      (as root, on Linux)

The two hosts are network namespaces of this machine, joined by a pair of virtual interfaces whose rate `tc tbf` limits,
so that what is measured is the way over a network and not shared memory. In each runs one process, as under torchrun.
All compressions train the same network on scikit-learn's digits, in turns: seed by seed, and within a seed one after
the other. Steps per second are those after the tenth step, when PowerSGD has begun to compress.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from hosts import Host, sent_bytes, two_hosts

COMPRESSIONS = ("none", "bfloat16", "powersgd")
SKIPPED = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=200, help="10^6 bits per second in each direction")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8, help="of PowerSGD")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        trained(arguments)
        return
    with two_hosts(arguments.mbit) as hosts, ExitStack() as stack:
        told = measured(stack, hosts)
    tell(told)


def measured(stack: ExitStack, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """What the first process tells, after both have ended."""
    processes = []
    for number, host in enumerate(hosts):
        environment = {
            **os.environ,
            **host.environment,
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": "29555",
            "WORLD_SIZE": "2",
            "RANK": str(number),
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(number),
            "LOCAL_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "hosts",
            "OMP_NUM_THREADS": "1",
        }
        words = host.command(sys.executable, *sys.argv, "--process", str(number))
        output = subprocess.PIPE if number == 0 else subprocess.DEVNULL
        process = stack.enter_context(subprocess.Popen(words, env=environment, stdout=output, text=True))
        stack.callback(process.kill)
        processes.append(process)
    told = [json.loads(line) for line in processes[0].stdout or () if line.startswith("{")]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("a process failed")
    return told


def tell(told: list[dict[str, Any]]) -> None:
    base = {each["seed"]: each for each in told if each["compression"] == "none"}
    print(f"{'gradients':<10}{'ms a step':>10}{'MB a step':>11}{'steps/s':>9}{'final loss':>12}{'beside none':>13}")
    for compression in COMPRESSIONS:
        mine = [each for each in told if each["compression"] == compression]
        gains = [base[each["seed"]]["step_ms"] / each["step_ms"] for each in mine]
        losses = [each["loss"] / base[each["seed"]]["loss"] - 1 for each in mine]
        print(
            f"{compression:<10}{median(each['step_ms'] for each in mine):>10.1f}"
            f"{mean(each['megabytes'] for each in mine):>11.3f}"
            f"{median(gains):>8.2f}x{mean(each['loss'] for each in mine):>12.4f}{mean(losses):>+13.2%}"
            f"   gains {min(gains):.2f} to {max(gains):.2f}, losses {min(losses):+.2%} to {max(losses):+.2%}"
        )


def trained(arguments: argparse.Namespace) -> None:
    """One of the two processes."""
    from hasten.core.sections import Distributed
    from hasten.distributed.group import joined

    spread = Distributed(
        kind="ddp", devices=2, powersgd_rank=arguments.rank, powersgd_start=SKIPPED, timeout_seconds=120
    )
    with joined(spread) as group:
        for seed in range(arguments.seeds):
            for compression in COMPRESSIONS:
                told = training(arguments, seed, replace(group, spread=replace(spread, compression=compression)))
                print(json.dumps({"seed": seed, "compression": compression, **told}), flush=True)


def training(arguments: argparse.Namespace, seed: int, group: Any) -> dict[str, float]:
    import numpy as np
    import pytorch_lightning as pl
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from hasten.core.interfaces import Rows, Silent
    from hasten.core.sections import TrainingSettings
    from hasten.tasks.classification import Classification
    from hasten.training.fit import fit

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.sent: list[int] = []

        def on_train_batch_end(self, *batch: Any) -> None:
            self.ends.append(perf_counter())
            self.sent.append(sent_bytes())

    digits = load_digits()
    torch.manual_seed(seed)
    width = arguments.width
    model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(
            model,
            Rows(inputs={"input": (digits.data / 16).astype(np.float32)}, targets=digits.target),
            TrainingSettings(epochs=arguments.epochs, batch_size=64, lr=0.001, weight_decay=0.01),
            task=Classification(label_smoothing=0.1),
            seed=seed,
            threads=1,
            folder=Path(folder),
            checkpoint_seconds=1e9,
            progress=Silent(),
            what=group.spread.compression,
            key="model.training",
            callbacks=[steps],
            group=group,
        )
    num_steps = len(steps.ends) - 1 - SKIPPED
    return {
        "step_ms": 1e3 * (steps.ends[-1] - steps.ends[SKIPPED]) / num_steps,
        "megabytes": (steps.sent[-1] - steps.sent[SKIPPED]) / num_steps / 1e6,
        "loss": fitted.curves["train_loss"][-1],
    }


if __name__ == "__main__":
    main()
