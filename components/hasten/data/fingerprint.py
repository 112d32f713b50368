"""Identity of rows by what they hold."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.interfaces import Columns, Table


class Stream:
    """SHA-256 of columns that come piece by piece: where the pieces are cut makes no difference.

    It covers names, order, dtypes, shapes and elements. Texts and bytes count by their content, numbers by their bits.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}

    def add(self, columns: Columns) -> None:
        """The next rows of each column."""
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = _Column()
            self._columns[name].add(values)

    def hexdigest(self) -> str:
        digest = hashlib.sha256()
        for name, column in self._columns.items():
            digest.update(f"{name!r} {column.hexdigest()}\n".encode())
        return digest.hexdigest()


class _Column:
    def __init__(self) -> None:
        self._kind = ""
        self._rows = 0
        self._lengths = hashlib.sha256()
        self._content = hashlib.sha256()

    def add(self, values: NDArray[Any]) -> None:
        if not len(values):
            # A piece without rows has no kind: of texts it could not be told from one of bytes.
            return
        texts = values.dtype.kind in "OU"
        kind = ("text" if isinstance(values.flat[0], str) else "bytes") if texts else values.dtype.str
        self._kind = self._kind or f"{kind} {values.shape[1:]}"
        self._rows += len(values)
        if texts:
            encoded = [_encoded(value) for value in values.flat]
            self._lengths.update(np.array([len(each) for each in encoded], dtype="<i8").tobytes())
            self._content.update(b"".join(encoded))
        else:
            self._content.update(np.ascontiguousarray(values).view(np.uint8).data)

    def hexdigest(self) -> str:
        summary = f"{self._kind} {self._rows} {self._lengths.hexdigest()} {self._content.hexdigest()}"
        return hashlib.sha256(summary.encode()).hexdigest()


def _encoded(value: str | bytes) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


def fingerprint(*arrays: NDArray[Any]) -> str:
    """SHA-256 of dtypes, shapes and elements: equal arrays (B, ...), equal fingerprint, whatever their strides."""
    stream = Stream()
    stream.add({str(place): array for place, array in enumerate(arrays)})
    return stream.hexdigest()


def of_table(table: Table) -> str:
    """SHA-256 of all that a table holds but its notes."""
    stream = Stream()
    stream.add({f"inputs.{name}": values for name, values in table.inputs.items()})
    stream.add(
        {name: values for name, values in (("targets", table.targets), ("parts", table.parts)) if values is not None}
    )
    return hashlib.sha256(f"{stream.hexdigest()} in_order={table.in_order}".encode()).hexdigest()
