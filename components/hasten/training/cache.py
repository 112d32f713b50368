"""Where the rows of a training are kept."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.interfaces import Rows
from hasten.core.memory import free_bytes
from hasten.core.sections import Cache, Loader

FREE_SHARE = 0.25
"""Share of what is free that `auto` takes for rows: the training wants memory too, and others of the machine."""


def cached(rows: Rows, cache: Cache) -> tuple[Rows, str]:
    """The same rows where the loader wants them, and a sentence that says where that is and why.

    Only columns that are mapped from files move; what the process holds already stays where it is.

    Args:
        cache: `disk` and `none` leave everything where it is.
    """
    mapped = sum(values.nbytes for values in _columns(rows) if mapping(values) is not None)
    size = f"{size_bytes(rows) / 1e6:.0f} MB of training rows"
    if not mapped:
        again = ", and transformed whenever they are read" if rows.deferred else ""
        return rows, f"{size} are held by the process{again}"
    free = free_bytes()
    told = "unknown" if free is None else f"{free / 1e6:.0f} MB"
    reason = f"loader.cache={cache}"
    if cache == "auto":
        fits = free is not None and mapped <= FREE_SHARE * free
        reason = f"{'they fit' if fits else 'they do not fit'} into {FREE_SHARE:.0%} of what is free, {told}"
        cache = "memory" if fits else "disk"
    if cache == "memory":
        return _copied(rows), f"{size} are kept in memory: {reason}"
    return rows, f"{size} are read from mapped files: {reason}"


def resolved(loader: Loader, rows: Rows) -> Loader:
    """The loader with `rows` or `blocks` in place of the order `auto`, as the size of these rows decides.

    Args:
        rows: as they are kept in files, whatever the cache: it has no say in the order, which is part of the result.
    """
    if loader.order != "auto":
        return loader
    return replace(loader, order="blocks" if size_bytes(rows) > loader.blocks_above_mb * 1e6 else "rows")


def size_bytes(rows: Rows) -> int:
    """Of all inputs and targets; of texts and bytes their lengths."""
    return sum(column_bytes(values) for values in _columns(rows))


def column_bytes(values: NDArray[Any]) -> int:
    return sum(map(len, values)) if values.dtype.kind == "O" else values.nbytes


def mapping(values: NDArray[Any]) -> mmap.mmap | None:
    """The mapped file that an array is a view of; None where it lies in memory."""
    base: Any = values
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def _copied(rows: Rows) -> Rows:
    inputs = {name: _in_memory(values) for name, values in rows.inputs.items()}
    return replace(rows, inputs=inputs, targets=_in_memory(rows.targets))


def _in_memory(values: NDArray[Any]) -> NDArray[Any]:
    return values if mapping(values) is None else np.array(values)


def _columns(rows: Rows) -> tuple[NDArray[Any], ...]:
    return (*rows.inputs.values(), rows.targets)
