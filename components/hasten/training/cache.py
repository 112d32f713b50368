"""Where the rows of a training are kept."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.artefacts.rows import take
from hasten.core.interfaces import Rows, Transform
from hasten.core.memory import free_bytes
from hasten.core.sections import Cache, Loader

FREE_SHARE = 0.25
"""Share of what is free that `auto` takes for rows: the training wants memory too, and others of the machine."""

_AT_ONCE = 1024
"""Rows that are copied at a time, so that what transforms need on the way stays small."""


def cached(rows: Rows, cache: Cache) -> tuple[Rows, str]:
    """The same rows where the loader wants them, and a sentence that says where that is and why.

    Only rows that are mapped from files move; what the process holds already stays where it is. In memory, transforms
    that were deferred are applied once for all, unless it is too small for what they make.

    Args:
        cache: `disk` and `none` leave everything where it is.
    """
    mapped = sum(values.nbytes for values in _columns(rows) if mapping(values) is not None)
    size = f"{size_bytes(rows) / 1e6:.0f} MB of training rows"
    if not mapped:
        again = ", and transformed whenever they are read" if rows.deferred else ""
        return rows, f"{size} are held by the process{again}"
    if cache in ("disk", "none"):
        return rows, f"{size} are read from mapped files: loader.cache={cache}"
    free = free_bytes()
    room = 0 if free is None else int(FREE_SHARE * free)
    told = f"{FREE_SHARE:.0%} of what is free, {'unknown' if free is None else f'{free / 1e6:.0f} MB'}"
    if transformed_bytes(rows) <= room:
        done = " as a model takes them" if rows.deferred else ""
        return _in_memory(rows, rows.deferred), f"{size} are kept in memory{done}: they fit into {told}"
    if cache == "memory" or mapped <= room:
        reason = f"they fit into {told}" if mapped <= room else f"loader.cache={cache}"
        return _in_memory(rows, ()), f"{size} are kept in memory: {reason}"
    return rows, f"{size} are read from mapped files: they do not fit into {told}"


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


def transformed_bytes(rows: Rows) -> int:
    """Of all rows as a model takes them, judged by the first; targets included."""
    return size_bytes(take(rows, np.arange(1))) * len(rows)


def _in_memory(rows: Rows, transforms: tuple[Transform, ...]) -> Rows:
    """A copy to which these of the deferred transforms have been applied: all, or none."""
    kept = replace(rows, deferred=transforms)
    parts = (take(kept, np.arange(start, min(start + _AT_ONCE, len(rows)))) for start in range(0, len(rows), _AT_ONCE))
    made: dict[str, NDArray[Any]] = {}
    for number, part in enumerate(parts):
        for name, values in part.inputs.items():
            if not number:
                made[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            made[name][number * _AT_ONCE :][: len(values)] = values
    left = () if transforms else rows.deferred
    return replace(rows, inputs=made, targets=np.array(rows.targets), deferred=left)


def _columns(rows: Rows) -> tuple[NDArray[Any], ...]:
    return (*rows.inputs.values(), rows.targets)
