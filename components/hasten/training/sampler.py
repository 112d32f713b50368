"""Which rows make up which batch, and the batches themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class ResumableBatches(Sampler[list[int]]):
    """Row numbers of the batches of an epoch, shuffled anew in each, from the position that the training has reached.

    A plain sampler starts an interrupted epoch over from its first batch. This one asks for the position, which is a
    count of global batches, so it holds for any number of processes: each takes every `world_size`-th row of a batch.

    Args:
        num_rows: of the data.
        batch_size: rows per step over all processes; a last partial batch is left out.
        seed: of the order.
        position: gives (epoch, batches of it that are done).
        rank: of this process.
        world_size: number of processes, a divisor of the batch size.

    Raises:
        ValueError: there is no whole batch, or it can't be shared out evenly.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 < batch_size <= num_rows:
            raise ValueError(f"batch_size must be in [1, {num_rows}], the number of rows, got {batch_size}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} can't be shared out evenly among {world_size} processes")
        self.num_rows, self.batch_size, self.seed, self.position = num_rows, batch_size, seed, position
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the training stands."""
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self.position()
        order = _order(self.num_rows, self.seed, epoch)
        for batch in range(done, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield rows[self.rank :: self.world_size].tolist()


def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    # Seeds that differ by little give related streams in some generators; drawing the epoch's seed decouples them.
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (epoch + 1,), generator=generator)
    return torch.randperm(num_rows, generator=generator.manual_seed(int(seeds[epoch])))


class Batches(Dataset[tuple[Tensor, ...]]):
    """Tensors of equal length, indexed a whole batch at a time: one gather per tensor instead of Python per row.

    Tensors may be mapped from a file: a batch reads its own rows of it.

    Args:
        rows: the part of the tensors' rows that there is; None for all.
    """

    def __init__(self, *tensors: Tensor, rows: Sequence[int] | None = None) -> None:
        self.tensors, self._rows = tensors, rows

    def __len__(self) -> int:
        return len(self.tensors[0] if self._rows is None else self._rows)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        if self._rows is not None:
            rows = [self._rows[row] for row in rows]
        return tuple(tensor[rows] for tensor in self.tensors)

    def part(self, rows: Sequence[int]) -> Batches:
        """These rows alone, of all that the tensors have; nothing is copied."""
        return Batches(*self.tensors, rows=rows)


def as_is(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch
