"""What every transform asks of the columns that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform


def column(columns: Columns, name: str, step: Transform) -> NDArray[Any]:
    """The column of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in columns:
        raise ConfigError(
            f"{_name(step)} wants the column {name}, but there is only {', '.join(columns) or 'none'} (data.transforms)"
        )
    return columns[name]


def numbers(columns: Columns, name: str, step: Transform) -> NDArray[Any]:
    """The column of that name, which has to hold real numbers (B, ...).

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    values = column(columns, name, step)
    if values.dtype.kind not in "biuf" or values.ndim < 1:
        raise ConfigError(f"{_name(step)} wants numbers in the column {name}, got {told(values)}")
    return values


def texts(columns: Columns, name: str, step: Transform) -> list[str]:
    """The column of that name, which has to hold one text a row.

    Raises:
        ConfigError: there is none, or a row is no text.
    """
    values = column(columns, name, step)
    if values.ndim != 1 or values.dtype.kind not in "OU":
        raise ConfigError(f"{_name(step)} wants one text a row in the column {name}, got {told(values)}")
    rows: list[Any] = values.tolist()
    for row, value in enumerate(rows):
        if not isinstance(value, str):
            raise ConfigError(f"{_name(step)} wants texts in the column {name}, got {_kind(value)} in row {row}")
    return rows


def replaced(columns: Columns, names: Iterable[str], made: Columns, step: Transform) -> Columns:
    """The columns with those that were made in the place of the first of `names`, and without the rest of them.

    Raises:
        ConfigError: what was made has the name of a column that stays.
    """
    gone = set(names)
    stay = [name for name in columns if name not in gone]
    if taken := sorted(set(stay) & set(made)):
        raise ConfigError(f"{_name(step)} makes the column {taken[0]}, which is there already (data.transforms)")
    after: dict[str, NDArray[Any]] = {}
    for name, values in columns.items():
        if name in gone:
            after.update(made)
        else:
            after[name] = values
    return after


def told(values: NDArray[Any]) -> str:
    """What an array holds, for an error."""
    if values.dtype.kind == "O" and values.ndim == 1 and len(values):
        return f"values of type {_kind(values[0])}"
    return f"{values.dtype} of shape {values.shape}"


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _name(step: Transform) -> str:
    return type(step).__name__
