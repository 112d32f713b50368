"""Requests of the shapes that a target names: so many rows, and so long along the axes whose length may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.interfaces import Columns, Input, Request, Target


def request_of(rows: Columns, inputs: Sequence[Input], request: Request) -> list[NDArray[Any]]:
    """One array (batch_size, *shape) an input: the first rows, repeated where there are fewer, cut to the length."""
    return [_cut(rows[each.name], each, request) for each in inputs]


def _cut(rows: NDArray[Any], source: Input, request: Request) -> NDArray[Any]:
    taken = rows[np.arange(request.batch_size) % len(rows)]
    if request.length is not None:
        for axis in source.dynamic:
            taken = taken.take(range(request.length), axis + 1)
    return taken


def sized(inputs: Sequence[Input], length: int | None) -> tuple[Input, ...]:
    """The inputs as a request of that length has them, every axis of one size."""
    return tuple(
        Input(
            name=each.name,
            dtype=each.dtype,
            shape=tuple(
                length if length is not None and axis in each.dynamic else size for axis, size in enumerate(each.shape)
            ),
        )
        for each in inputs
    )


def refusals(target: Target, inputs: Sequence[Input]) -> Iterator[str]:
    """Why the inputs can't be as long as the target's requests, one line a request."""
    lengths = {"target.length": target.length}
    lengths |= {f"target.also[{place}].length": request.length for place, request in enumerate(target.also)}
    greatest = {each.name: min(each.shape[axis] for axis in each.dynamic) for each in inputs if each.dynamic}
    for key, length in lengths.items():
        if length is None:
            continue
        if not greatest:
            yield f"length must be null where no input has an axis whose size may differ, got {length} ({key})"
        elif length > min(greatest.values()):
            name = min(greatest, key=lambda name: greatest[name])
            yield f"length must be at most {greatest[name]}, the size of input {name}, got {length} ({key})"
