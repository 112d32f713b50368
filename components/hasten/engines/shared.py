"""Arrays in memory that several processes map: the way of tensors between devices.

The memory is anonymous (`memfd_create`) and belongs to whoever holds one of its descriptors, so that nothing is left
behind when processes die. There is a piece for each tensor of each request under way, and one process writes it at a
time; whoever writes what does not fit lets it grow. Others learn of shape and type by a message once it is written.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = 4096


class SharedMemory:
    """Pieces of memory by their number.

    Args:
        descriptors: of the pieces, open for as long as this is used.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = tuple(descriptors)
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def create(cls, pieces: int) -> SharedMemory:
        return cls([os.memfd_create("hasten", os.MFD_CLOEXEC) for _ in range(pieces)])

    def write(self, piece: int, values: NDArray[Any]) -> dict[str, Any]:
        """Copies an array into a piece; the answer is what `read` needs to find it, as plain values."""
        values = np.asarray(values)
        size = max(1, values.nbytes)
        if os.fstat(self.descriptors[piece]).st_size < size:
            os.ftruncate(self.descriptors[piece], -(-size // _PAGE) * _PAGE)
        header = {"piece": piece, "shape": list(values.shape), "dtype": values.dtype.str}
        self.read(header)[...] = values
        return header

    def read(self, header: Mapping[str, Any]) -> NDArray[Any]:
        """The array itself, not a copy: it changes when the piece is written again."""
        shape, dtype = tuple(header["shape"]), np.dtype(header["dtype"])
        size = max(1, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        known = self._maps.get(header["piece"])
        if known is None or len(known) < size:
            # The old map stays for as long as an array of it is alive.
            descriptor = self.descriptors[header["piece"]]
            known = self._maps[header["piece"]] = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        return np.ndarray(shape, dtype, buffer=known)

    def close(self) -> None:
        self._maps.clear()
        for descriptor in self.descriptors:
            os.close(descriptor)
