"""The processes that train one model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hasten.core.sections import Distributed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One process' place among those that train together.

    Attributes:
        spread: how the training is spread over them.
        rank: of this process.
        size: number of processes.
    """

    spread: Distributed
    rank: int
    size: int

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes."""
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: T) -> T:
        """What the first process gives."""
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]


@contextmanager
def joined(spread: Distributed) -> Iterator[Group]:
    """Meets the others where torchrun's environment variables say, and takes leave of them.

    Whoever waits for a process that does not come ends after `spread.timeout_seconds`.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=spread.timeout_seconds))
    try:
        yield Group(spread=spread, rank=dist.get_rank(), size=dist.get_world_size())
        dist.barrier()  # gloo aborts a process whose peer is gone while it still takes leave
    finally:
        dist.destroy_process_group()
