"""Between NumPy arrays and PyTorch's tensors, for the engines that run on the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Input, Runner, Signature

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_SIGNATURE = "signature.json"


def write_signature(signature: Signature, folder: Path) -> None:
    """Keeps the names and types of inputs and outputs' shape beside a compiled model that doesn't tell them itself."""
    write_json(folder / _SIGNATURE, signature.to_dict())


def read_signature(folder: Path) -> Signature:
    """What `write_signature` kept."""
    return Signature.from_dict(read_json(folder / _SIGNATURE))


def read_inputs(folder: Path) -> tuple[Input, ...]:
    """The inputs that `write_signature` kept."""
    return read_signature(folder).inputs


def tensors(inputs: Sequence[Input], arrays: Sequence[NDArray[Any]]) -> Mapping[str, torch.Tensor]:
    """The arrays of a request by the names of the inputs; memory is shared where their form allows.

    Raises:
        ValueError: there is not one array for each input.
    """
    import torch

    pairs = zip(inputs, arrays, strict=True)
    return {each.name: torch.from_numpy(_own(values, each.dtype)) for each, values in pairs}


def in_parts(run: Runner, inputs: Sequence[NDArray[Any]], size: int) -> NDArray[Any]:
    """The outputs of a request by a runner that takes exactly `size` rows: the last part is filled up with its last
    row."""
    rows = len(inputs[0])
    if rows == size:
        outputs: NDArray[Any] = run(*inputs)
        return outputs
    orders = (np.minimum(np.arange(start, start + size), rows - 1) for start in range(0, rows, size))
    return np.concatenate([run(*(values[order] for values in inputs)) for order in orders])[:rows]


def _own(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The values as PyTorch can share them: contiguous, of the input's type, in memory that may be written to."""
    contiguous = np.ascontiguousarray(values, dtype=dtype)
    return contiguous if contiguous.flags.writeable else contiguous.copy()
