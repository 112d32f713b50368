"""Columns that come piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.interfaces import Columns


def joined(pieces: Sequence[Columns]) -> Columns:
    """The rows of all pieces, of which there is at least one; a single one is given back as it is."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


class Joined(Mapping[str, "NDArray[Any]"]):
    """The columns of all pieces, each put together when it is first asked for: what nobody asks for is never read.

    Args:
        pieces: begins with the first at each iteration.
    """

    def __init__(self, pieces: Iterable[Columns]) -> None:
        self._pieces = pieces
        self._names: tuple[str, ...] = ()
        self._columns: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self:
            raise KeyError(name)
        if name not in self._columns:
            self._columns[name] = joined([{name: piece[name]} for piece in self._pieces])[name]
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all_names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all_names())

    def __len__(self) -> int:
        return len(self._all_names())

    def _all_names(self) -> tuple[str, ...]:
        self._names = self._names or tuple(next(iter(self._pieces)))
        return self._names
