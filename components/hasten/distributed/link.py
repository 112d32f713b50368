"""The way between two processes that train together: how long a collective takes on it.

`python -m hasten.distributed.link` is one of the processes in which `measured` times it, by gloo's all-reduce.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

from hasten.core.errors import MeasurementError
from hasten.core.interpreter import import_path

SMALL, LARGE = 4 * 2**10, 8 * 2**20
"""Bytes: of a message whose way is all latency, and of one that is nearly all transfer."""
REPEATS = 9
TIMEOUT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a message costs: `latency_seconds`, and its bytes over `bytes_per_second`.

    Collectives are those of a ring, in which each of n processes sends to the next (Thakur, Rabenseifner and Gropp,
    "Optimization of Collective Communication Operations in MPICH", 2005).
    """

    latency_seconds: float
    bytes_per_second: float

    @classmethod
    def declared(cls, mbit: float) -> Link:
        """Of a network that makes so many 10^6 bits per second, with the latency of a local one."""
        return cls(latency_seconds=1e-4, bytes_per_second=mbit * 1e6 / 8)

    def all_reduce(self, num_bytes: float, size: int) -> float:
        """Seconds until each of so many processes has the sum: 2 (n - 1) messages of an n-th."""
        return 2 * self.gather(num_bytes, size)

    def gather(self, num_bytes: float, size: int) -> float:
        """Seconds until each has all `num_bytes`, of which it had an n-th; or an n-th of their sum."""
        return (size - 1) * self.message(num_bytes / size) if size > 1 else 0.0

    def message(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def through(cls, seconds: Mapping[int, float], size: int) -> Link:
        """From the times of all-reduces of `SMALL` and `LARGE` bytes."""
        messages = {num_bytes: spent / (2 * (size - 1)) for num_bytes, spent in seconds.items()}
        each = max((messages[LARGE] - messages[SMALL]) * size / (LARGE - SMALL), 1e-15)
        return cls(
            latency_seconds=max(messages[SMALL] - SMALL / size * each, 1e-6),
            bytes_per_second=1 / each,
        )


def measured() -> Link:
    """Between two processes of this machine that are started for it.

    Raises:
        MeasurementError: they failed, or took longer than a minute.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": import_path(),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-P", "-m", "hasten.distributed.link"]
    with tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for rank in range(2)
        ]
        try:
            told = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
            return Link(**json.loads(told[0].splitlines()[-1]))
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"the link was not measured within {TIMEOUT_SECONDS} s") from error
        except (ValueError, IndexError, TypeError) as error:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise MeasurementError(f"the link between two processes could not be measured: {last}") from error
        finally:
            for process in processes:
                process.kill()
                process.wait()


def timed(group: Any = None) -> Link:
    """Between the processes of a group, each of which calls this; the first's figures are for all."""
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    seconds = {}
    for num_bytes in (SMALL, LARGE):
        values = torch.zeros(num_bytes // 4)
        spent = []
        for _ in range(REPEATS):
            dist.barrier(group)
            start = perf_counter()
            dist.all_reduce(values, group=group)
            spent.append(perf_counter() - start)
        seconds[num_bytes] = median(spent[1:])
    return Link.through(seconds, size)


def main() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    link = timed()
    if dist.get_rank() == 0:
        print(json.dumps(link.to_dict()), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
