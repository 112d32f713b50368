"""Arrays in `.npy` files that several processes write, each its own rows, and that are mapped to be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError

_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """A file of one column.

    Attributes:
        row_shape: of one row.
        begin: place of the first row's first byte in the file.
    """

    path: Path
    column: str
    dtype: str
    row_shape: tuple[int, ...]
    begin: int

    @classmethod
    def create(cls, path: Path, column: str, num_rows: int, like: NDArray[Any]) -> ArrayFile:
        """A file for so many rows as those of an array (B, ...), all 0 and without a place on the disk until they are
        written. One that is there and has this shape and type is left as it is."""
        dtype = like.dtype.newbyteorder("=")
        shape = (num_rows, *like.shape[1:])
        if not _holds(path, dtype, shape):
            with path.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + int(np.prod(shape)) * dtype.itemsize)
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return cls(path=path, column=column, dtype=dtype.str, row_shape=shape[1:], begin=file.tell())

    def checked(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values as the file has them.

        Raises:
            ConfigError: their type or the shape of their rows is another than those of the first rows.
        """
        if values.dtype != self.dtype or values.shape[1:] != self.row_shape:
            raise ConfigError(
                f"data: the column {self.column} has rows of shape {self.row_shape} and type {np.dtype(self.dtype)} "
                f"first, and later {values.shape[1:]} and {values.dtype}: a model takes rows of one shape "
                "(data.transforms)"
            )
        return np.ascontiguousarray(values, dtype=self.dtype)

    def write(self, first: int, values: NDArray[Any]) -> None:
        """Writes rows from that place on, through no mapping, so that they count as nobody's memory."""
        left = memoryview(values.reshape(-1).view(np.uint8).data)
        handle = os.open(self.path, os.O_WRONLY)
        try:
            place = self._place(first)
            while left:
                written = os.pwrite(handle, left, place)
                left, place = left[written:], place + written
        finally:
            os.close(handle)

    def content(self, first: int, end: int) -> Iterator[bytes]:
        """The bytes of rows, some at a time."""
        with self.path.open("rb") as file:
            file.seek(self._place(first))
            left = self._place(end) - self._place(first)
            while left > 0 and (read := file.read(min(left, _READ_BYTES))):
                left -= len(read)
                yield read

    def _place(self, row: int) -> int:
        return self.begin + row * int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize


def mapped(path: Path) -> NDArray[Any]:
    """The array of a file, whose bytes are read when they are looked at."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _holds(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    try:
        array = mapped(path)
    except (OSError, ValueError):
        return False
    return array.dtype == dtype and array.shape == shape
