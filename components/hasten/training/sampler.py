"""Which rows make up which batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An order in which reads stay local: the two-level shuffle of Xu et al. 2022 ("CorgiPile").

    Blocks of neighbouring rows follow one another at random, and the rows of as many of them as make a window are
    mixed. What a batch is drawn from is then a random sample of blocks, not of rows; `training.shuffle` measures what
    that does to it.

    Attributes:
        rows: neighbours that are read together; the last block has what is left over.
        window: blocks whose rows are mixed.
    """

    rows: int
    window: int


class ResumableBatches(Sampler[NDArray[np.int64]]):
    """Row numbers of the batches of an epoch, shuffled anew in each, from the position that the training has reached.

    A plain sampler starts an interrupted epoch over from its first batch. This one asks for the position, which is a
    count of global batches, so it holds for any number of processes: each takes every `world_size`-th row of a batch.
    It asks once, when an iteration begins: batches that are fetched before they are wanted do not move the position.

    Args:
        num_rows: of the data.
        batch_size: rows per step over all processes; a last partial batch is left out.
        seed: of the order.
        position: gives (epoch, batches of it that are done).
        blocks: in which rows are shuffled; None where any row may follow any other.
        announce: told the rows of each window before the first batch is drawn from it.
        rank: of this process.
        world_size: number of processes.
        parts: in which a batch is calculated one after the other; each process has its share of every part.

    Raises:
        ValueError: there is no whole batch, or a process would get no row of a part.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        *,
        blocks: Blocks | None = None,
        announce: Callable[[NDArray[np.int64]], None] = lambda numbers: None,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ) -> None:
        if not 0 < batch_size <= num_rows:
            raise ValueError(f"batch_size must be in [1, {num_rows}], the number of rows, got {batch_size}")
        if world_size > 1 and batch_size < world_size * parts:
            raise ValueError(f"batch_size {batch_size} has no row for each of {world_size} processes x {parts} parts")
        self.num_rows, self.batch_size, self.seed, self.position = num_rows, batch_size, seed, position
        self.blocks, self.rank, self.world_size = blocks, rank, world_size
        self._announce, self._parts = announce, parts

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the training stands."""
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        epoch, done = self.position()
        return self._batches(order(self.num_rows, self.seed, epoch, self.blocks, skip=done * self.batch_size), done)

    def _batches(self, pieces: Iterator[NDArray[np.int64]], done: int) -> Iterator[NDArray[np.int64]]:
        waiting = np.empty(0, np.int64)
        for _ in range(done, len(self)):
            while len(waiting) < self.batch_size:
                piece = next(pieces)
                self._announce(piece)
                waiting = np.concatenate([waiting, piece])
            batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            yield batch if self.world_size == 1 else self._share(batch)

    def _share(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process' rows of a batch, part by part."""
        parts = np.array_split(batch, self._parts)
        return np.concatenate([part[self.rank :: self.world_size] for part in parts])


def order(
    num_rows: int, seed: int, epoch: int, blocks: Blocks | None = None, *, skip: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Row numbers of an epoch, each once, in pieces: all at once, or window by window.

    Args:
        skip: rows at the beginning that are left out. Windows that are left out whole cost nothing.
    """
    # Seeds that differ by little give related streams in some generators; drawing the epoch's seed decouples them.
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (epoch + 1,), generator=generator)
    generator.manual_seed(int(seeds[epoch]))
    if blocks is None:
        yield _permutation(num_rows, generator)[skip:]
        return
    shuffled = _permutation(-(-num_rows // blocks.rows), generator)
    starts = range(0, len(shuffled), blocks.window)
    for start, window_seed in zip(starts, torch.randint(2**62, (len(starts),), generator=generator), strict=True):
        firsts = shuffled[start : start + blocks.window] * blocks.rows
        length = int(np.minimum(blocks.rows, num_rows - firsts).sum())
        if skip < length:
            rows = (firsts[:, None] + np.arange(blocks.rows)).ravel()
            rows = rows[rows < num_rows]  # the last block may be a part of one
            yield rows[_permutation(length, generator.manual_seed(int(window_seed)))][skip:]
        skip = max(0, skip - length)


def _permutation(number: int, generator: torch.Generator) -> NDArray[np.int64]:
    permutation: NDArray[np.int64] = torch.randperm(number, generator=generator).numpy()
    return permutation
