"""What every transform asks of the columns that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform

_CACHED = 2**15
"""Numbers of double precision that fit into a core's second cache, beside what they are made of (256 KB)."""

_FIRST_ROW: ContextVar[int] = ContextVar("_FIRST_ROW", default=0)


@contextmanager
def numbered_from(first: int) -> Iterator[None]:
    """Within it, rows count from `first`: they are a piece of more rows, by whose number a user finds them."""
    token = _FIRST_ROW.set(first)
    try:
        yield
    finally:
        _FIRST_ROW.reset(token)


def row_number(row: int) -> int:
    """The number by which an error names a row of the columns at hand."""
    return _FIRST_ROW.get() + row


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
            raise ConfigError(
                f"{_name(step)} wants texts in the column {name}, got {_kind(value)} in row {row_number(row)}"
            )
    return rows


def parts(values: NDArray[Any]) -> Iterator[slice]:
    """Rows a few at a time, so that what is reckoned of them in double precision stays in the processor's cache."""
    rows = max(1, _CACHED * len(values) // max(1, values.size))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


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
