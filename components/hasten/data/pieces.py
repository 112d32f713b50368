"""The rows of a source in pieces of a size that suits this machine, divided between splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.artefacts.rows import apply
from hasten.core.columns import joined
from hasten.core.interfaces import Columns, RowStream, Transform
from hasten.data.transforms.checks import numbered_from

_BYTES = 2**23
"""Of the source's rows in a shard, about: small enough to be held a few times by each process, and to be made again
after a kill, large enough that handing it over costs nothing beside."""
_MOST_ROWS = 4096
"""In a shard: what is small in the source may grow (a text to numbers, a file to pixels)."""

_FEW = 16
"""First rows, by whose size shards are cut."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one split that follow one another in it.

    Attributes:
        first: their first one's place in the split.
    """

    first: int
    columns: Columns

    @property
    def num_rows(self) -> int:
        return count(self.columns)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows that follow one another in the source, divided between splits. The unit of work, of resuming and of
    checksums.

    Attributes:
        parts: split -> its rows, in the order of the source; splits without a row here are missing.
    """

    number: int
    parts: Mapping[str, Part]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts.values())


class Shards:
    """A source cut into shards: where, depends on its rows alone, not on how it stores or gives them.

    Args:
        places: split -> its row numbers in the source, in ascending order.
    """

    def __init__(self, stream: RowStream, places: Mapping[str, NDArray[np.int64]]) -> None:
        self._stream = stream
        self._places = places
        self._rows = _rows_of_a_shard(next(regrouped(stream.pieces(), _FEW)))

    def __len__(self) -> int:
        return -(-self._stream.num_rows // self._rows)

    def __iter__(self) -> Iterator[Shard]:
        """Reads the source from its first row."""
        for number, columns in enumerate(regrouped(self._stream.pieces(), self._rows)):
            yield Shard(number=number, parts=dict(self._parts(number, columns)))

    def spans(self, number: int) -> dict[str, tuple[int, int]]:
        """Split -> first row and end of what it has in the shard, as places in the split."""
        borders = np.array([number, number + 1]) * self._rows
        return {split: tuple(np.searchsorted(rows, borders).tolist()) for split, rows in self._places.items()}

    def _parts(self, number: int, columns: Columns) -> Iterator[tuple[str, Part]]:
        for split, (first, end) in self.spans(number).items():
            if first < end:
                rows = self._places[split][first:end] - number * self._rows
                yield split, Part(first=first, columns={name: values[rows] for name, values in columns.items()})


@dataclass(frozen=True)
class OfSplit:
    """The rows of one split, as the source has them, piece by piece."""

    shards: Shards
    split: str

    def __iter__(self) -> Iterator[Columns]:
        for shard in self.shards:
            if self.split in shard.parts:
                yield shard.parts[self.split].columns


@dataclass(frozen=True)
class Transformed:
    """Pieces as transforms leave them, calculated anew at each iteration."""

    pieces: Iterable[Columns]
    transforms: Sequence[Transform]

    def __iter__(self) -> Iterator[Columns]:
        first = 0
        for columns in self.pieces:
            with numbered_from(first):
                after = apply(self.transforms, columns)
            yield after
            first += count(columns)


def count(columns: Columns) -> int:
    """Rows of the columns."""
    return len(next(iter(columns.values())))


def regrouped(pieces: Iterable[Columns], rows: int) -> Iterator[Columns]:
    """The same rows in pieces of so many; the last may have fewer."""
    held: list[Columns] = []
    missing = rows
    for piece in pieces:
        begin, num_rows = 0, count(piece)
        while begin < num_rows:
            end = min(num_rows, begin + missing)
            held.append({name: values[begin:end] for name, values in piece.items()})
            missing -= end - begin
            begin = end
            if not missing:
                yield joined(held)
                held, missing = [], rows
    if held:
        yield joined(held)


def _rows_of_a_shard(first: Columns) -> int:
    row_bytes = sum(map(_bytes, first.values())) / count(first)
    return int(min(_MOST_ROWS, max(1, _BYTES // max(1, row_bytes))))


def _bytes(values: NDArray[Any]) -> int:
    return sum(map(len, values.flat)) if values.dtype == object else values.nbytes
