"""Rows in batches of the one size that an engine was compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.errors import EngineError
from hasten.core.interfaces import Input, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.export import ExportedProgram


def exported(module: Path, signature: Signature, batch: int, *, any_length: bool) -> ExportedProgram:
    """A module artefact as a graph for that many rows, whose inputs follow one another as in the signature.

    Args:
        any_length: dynamic axes stay dynamic, up to their greatest size; else they have that size.
    """
    import torch

    from hasten.artefacts.module import example, forward, rebuild

    model, names = rebuild(module), signature.names

    class InOrder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return forward(self.model, dict(zip(names, inputs, strict=True)))

    rows = tuple(example(signature.inputs, batch).values())
    shapes = tuple(_lengths(each) if any_length else {} for each in signature.inputs)
    return torch.export.export(InOrder().eval(), rows, dynamic_shapes=(shapes,))


def _lengths(source: Input) -> dict[int, Any]:
    import torch

    return {axis + 1: torch.export.Dim(f"length{axis}", max=source.shape[axis]) for axis in source.dynamic}


def check_shapes(sources: Sequence[Input], inputs: Sequence[NDArray[Any]], *, any_length: bool) -> None:
    """Compiled code does not look at shapes: with a wrong one it may read what lies behind the array.

    Raises:
        EngineError: a row has another shape than the one that was compiled for.
        ValueError: there is not one array for each input.
    """
    for source, values in zip(sources, inputs, strict=True):
        sizes, free = values.shape[1:], source.dynamic if any_length else ()
        fits = len(sizes) == len(source.shape) and all(
            size == wanted or (axis in free and 0 < size < wanted)
            for axis, (size, wanted) in enumerate(zip(sizes, source.shape, strict=True))
        )
        if not fits:
            raise EngineError(f"the model was compiled for rows of {source.name} of shape {source.shape}, got {sizes}")


def in_batches(
    run: Callable[[Sequence[NDArray[Any]]], NDArray[Any]], inputs: Sequence[NDArray[Any]], batch: int
) -> NDArray[Any]:
    """Outputs for any number of rows; the last batch is filled up with its last row.

    Args:
        run: takes exactly `batch` rows of each input.
    """
    number = len(inputs[0])
    if number == batch:
        return run(inputs)
    parts = []
    for start in range(0, number, batch):
        order = np.minimum(np.arange(start, start + batch), number - 1)
        parts.append(run([values[order] for values in inputs]))
    return np.concatenate(parts)[:number]
