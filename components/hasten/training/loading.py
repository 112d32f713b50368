"""How rows reach a training."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from hasten.core.interfaces import Rows
from hasten.core.processor import num_cores
from hasten.core.sections import Accelerator, Loader
from hasten.training.ahead import ahead
from hasten.training.batches import Batch, Batches, RowByRow, as_is, collate
from hasten.training.cache import column_bytes, mapping
from hasten.training.sampler import ResumableBatches


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a training read in an epoch, or in the part of one that it did.

    Attributes:
        num_batches: that it was given.
        waited_seconds: for batches that were not ready.
        asked_bytes: of the rows in these batches, as they are kept.
        read_bytes: that storage delivered to the process and its workers since the readings before, whatever for; of
            the first, since the loader was made or rows were cached. None where the system does not tell.
    """

    num_batches: int
    waited_seconds: float
    asked_bytes: int
    read_bytes: int | None

    @property
    def hit_rate(self) -> float | None:
        """Share of what was asked for that lay in memory, in [0, 1]: of the process or of the system's page cache.

        Storage delivers whole pages and some in advance, so more may be read than was asked for; that is no hit.
        """
        if self.read_bytes is None or not self.asked_bytes:
            return None
        return max(0.0, 1 - self.read_bytes / self.asked_bytes)

    @property
    def told(self) -> str:
        """`5.90 GB of rows asked for, 1.20 GB read from storage, cache hit rate 80 %`; empty where nothing is known."""
        if self.hit_rate is None or self.read_bytes is None:
            return ""
        asked, read = (f"{size / 1e9:.3g} GB" for size in (self.asked_bytes, self.read_bytes))
        return f"{asked} of rows asked for, {read} read from storage, cache hit rate {self.hit_rate:.0%}"


class BatchLoader:
    """Batches in the order of a sampler; they are the same, whatever the loader's section says.

    An iteration goes from the position that the training has reached to the end of its epoch. The next one, and
    leaving the context, end the one before and its thread.

    Args:
        batches: what there is.
        order: which rows make up which batch.
        loader: how they are fetched; its cache and its order have been seen to.
        pin: whether batches are put where a GPU copies from without waiting.
        delivered: `delivered_bytes` of when reading began; None for now.
        row_bytes: of a row where it came from; None where that is as the batches have it.
    """

    def __init__(
        self,
        batches: Batches,
        order: ResumableBatches,
        loader: Loader,
        *,
        pin: bool,
        delivered: int | None = None,
        row_bytes: float | None = None,
    ) -> None:
        self._batches, self._order, self._ahead, self._pin = batches, order, loader.ahead, pin
        self._delivered = delivered_bytes() if delivered is None else delivered
        if row_bytes is None:
            row_bytes = sum(map(column_bytes, batches.columns)) / len(batches.rows)
        self._batch_bytes = round(order.batch_size * row_bytes)
        self._torchs = _torchs(batches, order, loader, pin=pin) if loader.row_by_row or loader.workers else None
        self._workers = loader.workers
        self._running: Generator[Batch, None, None] | None = None
        self.readings: list[Readings] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._torchs is not None and self._torchs._iterator is not None:
            # There is no public way; without it, workers live for as long as a traceback holds on to the iterator.
            self._torchs._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the training stands."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        self._running = self._epoch()
        return self._running

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()

    def _source(self) -> Generator[Batch, None, None]:
        if self._torchs is None:
            return self._prefetched(self._gathered(iter(self._order)))
        with warnings.catch_warnings():
            # Python's warning of what torch's workers avoid: they use one thread.
            warnings.filterwarnings("ignore", message=".*use of fork\\(\\) may lead to deadlocks.*")
            batches = (batch for batch in iter(self._torchs))
        return batches if self._workers else self._prefetched(batches)

    def _gathered(self, order: Iterator[Any]) -> Generator[Batch, None, None]:
        for numbers in order:
            batch = self._batches.__getitems__(numbers)
            yield tuple(values.pin_memory() for values in batch) if self._pin else batch

    def _prefetched(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        return ahead(batches, self._ahead) if self._ahead else batches

    def _epoch(self) -> Generator[Batch, None, None]:
        # Not before the first batch is wanted: Lightning makes an iterator before it has reached the epoch.
        _, done = self._order.position()
        if done >= len(self):
            return
        source = self._source()
        watched = _Watched(source)
        try:
            with closing(source):
                yield from islice(watched, len(self) - done - 1)
                last = next(watched)
        finally:
            self._record(watched)
        # After this one a training asks no more, but what was read is known.
        yield last

    def _record(self, watched: _Watched) -> None:
        before, self._delivered = self._delivered, delivered_bytes()
        self.readings.append(
            Readings(
                num_batches=watched.num_batches,
                waited_seconds=watched.waited_seconds,
                asked_bytes=watched.num_batches * self._batch_bytes,
                read_bytes=None if before is None or self._delivered is None else self._delivered - before,
            )
        )


class _Watched(Iterator[Batch]):
    """Counts batches, and the time until they came."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.num_batches, self.waited_seconds = batches, 0, 0.0

    def __next__(self) -> Batch:
        start = perf_counter()
        batch = next(self._batches)
        self.waited_seconds += perf_counter() - start
        self.num_batches += 1
        return batch


def _torchs(batches: Batches, order: ResumableBatches, loader: Loader, *, pin: bool) -> DataLoader[Any]:
    """PyTorch's own loader, for what is fetched row by row or by worker processes, which live as long as it does."""
    return DataLoader(
        RowByRow(batches) if loader.row_by_row else batches,
        batch_sampler=order,  # type: ignore[arg-type]  # of arrays of row numbers, in place of lists
        collate_fn=collate if loader.row_by_row else as_is,  # type: ignore[arg-type]
        num_workers=loader.workers,
        prefetch_factor=max(1, loader.ahead) if loader.workers else None,
        persistent_workers=loader.workers > 0,
        # A forked worker reads the very arrays, mapped or not; another would be sent a copy of them.
        multiprocessing_context="fork" if loader.workers and sys.platform == "linux" else None,
        pin_memory=pin,
        # Its own, because a loader draws a number from the global one whenever it is iterated.
        generator=torch.Generator(),
    )


def sparing(loader: Loader, rows: Rows, threads: int, accelerator: Accelerator) -> Loader:
    """The loader without its thread where that would only take a core from the training.

    It gains where it has a core of its own, and where it waits for storage. On two cores, a small CNN on 128 rows of
    3x32x32 took 0.9 times as long a step with it under one thread, and 1.1 times as long under two.

    Args:
        rows: where they are kept by now.
        threads: of the training.
        accelerator: that trains; under any other than the CPU, cores are free.
    """
    waits = any(mapping(values) is not None for values in (*rows.inputs.values(), rows.targets))
    if waits or accelerator != "cpu" or threads < num_cores():
        return loader
    return replace(loader, ahead=0) if loader.workers == 0 else loader


def delivered_bytes() -> int | None:
    """What storage has delivered so far to this process, its threads and its children, mapped pages included.

    Returns:
        None where the system does not tell.
    """
    own = _delivered_to("self")
    if own is None:
        return None
    return own + sum(_delivered_to(child.pid) or 0 for child in multiprocessing.active_children())


def _delivered_to(process: int | str | None) -> int | None:
    with suppress(OSError):  # no /proc, or the process has just ended
        for line in Path(f"/proc/{process}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name == "read_bytes":
                return int(value)
    return None
