"""Rows of mapped files that are wanted soon, told to the system so that it reads them and no others."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.memory import free_bytes
from hasten.training.cache import FREE_SHARE, mapping


@dataclass(frozen=True, kw_only=True)
class Announced:
    """Columns that are mapped from files, whose rows are read from the disk as they are announced.

    Left alone, the system reads as much round every row as it has been set to (megabytes, on some machines), which is a
    multiple of what blocks of neighbouring rows need.
    """

    columns: tuple[NDArray[Any], ...]

    @classmethod
    def of(cls, columns: Iterable[NDArray[Any]]) -> Announced:
        """The mapped ones, which from now on are read in no order that could be guessed."""
        mapped = tuple(values for values in columns if mapping(values) is not None and values.nbytes)
        for values in mapped:
            _map(values).madvise(mmap.MADV_RANDOM)
        return cls(columns=mapped)

    def __call__(self, numbers: NDArray[np.int64]) -> None:
        """These rows are wanted soon. Where they would crowd out the rest of the memory, they are read when they are.

        Args:
            numbers: (B,) in any order; neighbours are read in one go.
        """
        free = free_bytes()
        wanted = sum(values.nbytes // len(values) for values in self.columns) * len(numbers)
        if not len(numbers) or (free is not None and wanted > FREE_SHARE * free):
            return
        ordered = np.sort(numbers)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
            for values in self.columns:
                _will_need(values, int(run[0]), int(run[-1]) + 1)


def _will_need(values: NDArray[Any], first: int, end: int) -> None:
    mapped, row_bytes = _map(values), values.nbytes // len(values)
    origin = values.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    start = origin + first * row_bytes
    aligned = start - start % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_WILLNEED, aligned, origin + end * row_bytes - aligned)


def _map(values: NDArray[Any]) -> mmap.mmap:
    mapped = mapping(values)
    assert mapped is not None
    return mapped
