"""From rows as they are kept to a batch as a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Rows, Transform


def take(rows: Rows, numbers: NDArray[Any] | slice) -> Rows:
    """These rows, with all transforms applied that were deferred.

    Args:
        numbers: (B,) row numbers, in any order; or a slice.
    """
    gathered = {name: values[numbers] for name, values in rows.inputs.items()}
    inputs = as_inputs(apply(rows.deferred, gathered)) if rows.deferred else gathered
    return replace(rows, inputs=inputs, targets=rows.targets[numbers], deferred=())


def apply(transforms: Sequence[Transform], columns: Columns) -> Columns:
    return reduce(lambda given, transform: transform(given), transforms, columns)


def as_inputs(columns: Columns) -> Columns:
    """Columns in the types that models take: whole numbers of 32 or 64 bits as int64, all others as float32.

    Raises:
        ConfigError: a column still holds texts or bytes.
    """
    inputs = {}
    for name, values in columns.items():
        if values.dtype.kind not in "biuf":
            held = "texts or bytes" if values.dtype.kind == "O" else f"values of type {values.dtype}"
            raise ConfigError(
                f"data: the column {name} holds {held}, which no model takes: name a transform for it under "
                "data.transforms, or leave it out of data.inputs"
            )
        whole = values.dtype.kind in "iu" and values.dtype.itemsize >= 4
        inputs[name] = values.astype(np.int64 if whole else np.float32, copy=False)
    return inputs
