"""What compressed gradients gain where the network between two hosts is the bottleneck.

    python benchmarks/communication.py --mbit 200 --seeds 3      (as root, on Linux)

The two hosts are network namespaces of this machine, joined by a pair of virtual interfaces whose rate `tc tbf` limits,
so that what is measured is the way over a network and not shared memory. In each runs one process, as under torchrun.
All compressions train the same network on scikit-learn's digits, in turns: seed by seed, and within a seed one after
the other. Steps per second are those after the tenth step, when PowerSGD has begun to compress. Last, one more training
with each is profiled: what the profile says of the bytes of a step and of the time that is waited for them, beside what
the interface counted and the step took before.

Beside each is what the time model says (`distributed.timing`), from the rate that was declared, the latency of a small
all-reduce, and the step of a process with its share of the rows in a group of its own, which is wrapped and compressed
in the same way and sends nothing. Both processes measure it at the same time, before the trainings, so that they share
the machine as they will.
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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any
from unittest.mock import patch

from hosts import Host, sent_bytes, two_hosts

COMPRESSIONS = ("none", "bfloat16", "powersgd")
SKIPPED, UNDISTURBED = 10, 20
BATCH = 64


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
    tell(told[0], [each for each in told if "seed" in each])
    tell_profiles([each for each in told[1:] if "seed" not in each])


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


def tell(model: dict[str, Any], told: list[dict[str, Any]]) -> None:
    """What was measured beside what the time model says."""
    base = {each["seed"]: each for each in told if each["compression"] == "none"}
    expected = model["expected_ms"]
    print(
        f"{'gradients':<10}{'ms a step':>10}{'expected':>10}{'MB a step':>11}{'steps/s':>9}"
        f"{'final loss':>12}{'beside none':>13}"
    )
    for compression in COMPRESSIONS:
        mine = [each for each in told if each["compression"] == compression]
        step_ms = median(each["step_ms"] for each in mine)
        gains = [base[each["seed"]]["step_ms"] / each["step_ms"] for each in mine]
        losses = [each["loss"] / base[each["seed"]]["loss"] - 1 for each in mine]
        print(
            f"{compression:<10}{step_ms:>10.1f}{expected[compression]:>10.1f}"
            f"{mean(each['megabytes'] for each in mine):>11.3f}"
            f"{median(gains):>8.2f}x{mean(each['loss'] for each in mine):>12.4f}{mean(losses):>+13.2%}"
            f"   gains {min(gains):.2f} to {max(gains):.2f}, losses {min(losses):+.2%} to {max(losses):+.2%},"
            f" expected {expected[compression] / step_ms - 1:+.1%}"
        )
    print(model["told"])


def tell_profiles(told: list[dict[str, Any]]) -> None:
    print(f"{'gradients':<10}{'ms a step':>10}{'waited':>8}{'MB sent':>9}{'MB in the profile':>19}{'calls':>7}")
    for each in told:
        print(
            f"{each['compression']:<10}{each['step_ms']:>10.1f}{each['waited_ms']:>8.1f}{each['megabytes']:>9.3f}"
            f"{each['profile_megabytes']:>19.3f}{each['calls']:>7g}"
        )


def trained(arguments: argparse.Namespace) -> None:
    """One of the two processes."""
    from hasten.core.sections import Distributed
    from hasten.distributed.group import joined

    spread = Distributed(
        kind="ddp", devices=2, powersgd_rank=arguments.rank, powersgd_start=SKIPPED, timeout_seconds=120
    )
    with joined(spread) as group:
        print(json.dumps(expected(arguments, group)), flush=True)
        for seed in range(arguments.seeds):
            for compression in COMPRESSIONS:
                told = training(arguments, seed, replace(group, spread=replace(spread, compression=compression)))
                print(json.dumps({"seed": seed, "compression": compression, **told}), flush=True)
        for compression in COMPRESSIONS:
            told = profiled(arguments, replace(group, spread=replace(spread, compression=compression)))
            print(json.dumps({"compression": compression, **told}), flush=True)


def network(width: int) -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))


def expected(arguments: argparse.Namespace, group: Any) -> dict[str, Any]:
    """What the time model says of each compression, in ms a step."""
    import torch
    import torch.distributed as dist

    from hasten.core.interfaces import Input
    from hasten.core.sections import Step
    from hasten.distributed.footprint import PerRow
    from hasten.distributed.group import Group
    from hasten.distributed.link import Link, timed
    from hasten.distributed.timing import Speeds, step_time
    from hasten.tasks.classification import Classification
    from hasten.training.footprint import footprint

    @dataclass(frozen=True, kw_only=True)
    class Apart(Group):
        own: dist.ProcessGroup

        @property
        def rows_group(self) -> dist.ProcessGroup:
            return self.own

    inputs = [Input(name="input", shape=(64,), dtype="float32")]
    targets = torch.zeros(1, dtype=torch.long)
    found = footprint(lambda: network(arguments.width), inputs, targets, Classification(), Step())
    link = Link(
        latency_seconds=group.agreed(timed().latency_seconds),
        bytes_per_second=Link.declared(arguments.mbit).bytes_per_second,
    )
    # What a process takes for its share of the rows, wrapped and compressed as in the group, but sending nothing.
    own, _ = dist.new_subgroups(group_size=1)
    alone: dict[str, float] = {}
    for compression in ("none", *COMPRESSIONS):  # the first is slower
        apart = Apart(spread=replace(group.spread, compression=compression), rank=0, size=1, own=own)
        with patch.dict(os.environ, WORLD_SIZE="1", RANK="0"):
            alone[compression] = training(arguments, 0, apart, epochs=3)["step_ms"] / 1e3
        dist.barrier()
    times = {}
    for compression in COMPRESSIONS:
        speeds = Speeds(passes=PerRow(alone[compression], 0.0), update=0.0, link=link)
        spread = replace(group.spread, compression=compression)
        times[compression] = step_time(found, found, spread, BATCH, Step(), speeds)
    calculated = ", ".join(f"{1e3 * seconds:.1f} ms ({name})" for name, seconds in alone.items())
    told = (
        f"without anything to send a step takes {calculated}; {arguments.mbit:g} Mbit/s, "
        f"{1e3 * link.latency_seconds:.2f} ms a message"
    )
    return {"expected_ms": {name: 1e3 * time.seconds for name, time in times.items()}, "told": told}


def profiled(arguments: argparse.Namespace, group: Any) -> dict[str, float]:
    """Two processes send what their all-reduces are given: 2 (N - 1) / N of it."""
    from hasten.training.step_clock import StepClock
    from hasten.training.step_operators import OperatorWatch

    clock = StepClock()
    watch = OperatorWatch(clock, first=SKIPPED + UNDISTURBED + 1, group=group)
    told = training(arguments, 0, group, last=SKIPPED + UNDISTURBED, clock=clock, callbacks=[watch])
    collectives = watch.figures.collectives
    return {
        **told,
        "profile_megabytes": sum(each.num_bytes for each in collectives) / 1e6,
        "calls": sum(each.calls for each in collectives),
        "waited_ms": sum(watch.figures.waiting_ms.values()),
    }


def training(
    arguments: argparse.Namespace,
    seed: int,
    group: Any,
    last: int = -1,
    clock: Any = None,
    callbacks: Sequence[Any] = (),
    epochs: int | None = None,
) -> dict[str, float]:
    """Figures of the steps from `SKIPPED` to `last`, counted from 0."""
    import numpy as np
    import pytorch_lightning as pl
    import torch
    from sklearn.datasets import load_digits

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
    model = network(arguments.width)
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(
            model,
            Rows(inputs={"input": (digits.data / 16).astype(np.float32)}, targets=digits.target),
            TrainingSettings(
                epochs=epochs or arguments.epochs,
                batch_size=BATCH if group.size > 1 else BATCH // 2,
                lr=0.001,
                weight_decay=0.01,
            ),
            task=Classification(label_smoothing=0.1),
            seed=seed,
            threads=1,
            folder=Path(folder),
            checkpoint_seconds=1e9,
            progress=Silent(),
            what=group.spread.compression,
            key="model.training",
            callbacks=[steps, *callbacks],
            clock=clock,
            group=group,
        )
    num_steps = last % len(steps.ends) - SKIPPED
    return {
        "step_ms": 1e3 * (steps.ends[last] - steps.ends[SKIPPED]) / num_steps,
        "megabytes": (steps.sent[last] - steps.sent[SKIPPED]) / num_steps / 1e6,
        "loss": fitted.curves["train_loss"][-1],
    }


if __name__ == "__main__":
    main()
