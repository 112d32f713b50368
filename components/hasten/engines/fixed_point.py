"""Fixed-point numbers: the narrowest type that holds given values, and the integers behind quantized weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST_LEVEL = 2**15
"""Of signed weights of 16 bits, the widest that a recipe can declare."""
_EXACT = 2.0**-20
"""Share of the largest weight that float32 may have lost of it when it was multiplied by its scale and others."""
_PROBED = 16
"""Weights of a channel that a step is tried on before it is tried on all of them."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Multiples of 2^-(width - integer), as `ap_fixed<width, integer>` of HLS compilers.

    Attributes:
        width: bits in all, the sign's included.
        integer: bits left of the binary point, the sign's included; below 0 or above the width where it lies outside.
        saturates: what doesn't fit is rounded to the nearest (half to even) and clipped instead of cut and wrapped.
        symmetric: of a signed type that saturates, without its lowest value.
    """

    width: int
    integer: int
    signed: bool = True
    saturates: bool = False
    symmetric: bool = False

    @property
    def fraction(self) -> int:
        return self.width - self.integer

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        if not self.signed:
            return float((2**self.width - 1) * 2.0**-self.fraction)
        return float((2 ** (self.width - 1) - (1 if self.symmetric else 0)) * 2.0**-self.fraction)

    def __str__(self) -> str:
        overflow = ",RND_CONV,SAT_SYM" if self.symmetric else ",RND_CONV,SAT" if self.saturates else ""
        return f"{'fixed' if self.signed else 'ufixed'}<{self.width},{self.integer}{overflow}>"

    def rounded(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The nearest values of the type, half to even, clipped to its ends."""
        first, last = (-(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) if self.signed else (0, 2**self.width - 1)
        integers = np.round(np.asarray(values, np.float64) * 2.0**self.fraction)
        nearest: NDArray[np.float64] = np.clip(integers, first + self.symmetric, last) * 2.0**-self.fraction
        return nearest


def reaching(maximum: float, width: int, *, signed: bool = True, saturates: bool = False) -> Fixed:
    """The type of that width with the finest step that reaches a magnitude: maximum < 2^(integer - sign)."""
    exponent = math.frexp(maximum)[1] if maximum > 0 else 0
    return Fixed(width=width, integer=exponent + signed, signed=signed, saturates=saturates)


def exact(values: NDArray[Any], width: int) -> Fixed | None:
    """The narrowest signed type that holds all values as they are; None where that takes more than `width` bits."""
    mantissas, exponents = np.frexp(np.asarray(values, np.float64)[values != 0])
    if not mantissas.size:
        return Fixed(width=1, integer=1)
    integers = (np.abs(mantissas) * 2.0**24).astype(np.int64)  # float32 has 24 bits
    trailing = np.log2(integers & -integers).astype(int)
    lowest, top = int((exponents - 24 + trailing).min()), int(exponents.max())
    needed = top - lowest + 1
    return Fixed(width=needed, integer=top + 1) if needed <= width else None


def levels(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """The integers and the step of each row of weights (C, K) that lie on a grid: rows = step[:, None] * integers.

    The grid is found in the weights themselves: the fewest levels that all weights of a row are multiples of, within
    the precision of float32. So it does not matter which technique rounded them, nor that a normalization was folded.

    Returns:
        Integers (C, K) and steps (C,); None where a row lies on no grid of at most 16 bits.
    """
    integers, steps = np.zeros(rows.shape, np.int64), np.ones(len(rows))
    for channel, row in enumerate(np.asarray(rows, np.float64)):
        if not row.any():
            continue
        number = next(_grids(row), None)
        if number is None:
            return None
        found = np.round(row / np.abs(row).max() * number)
        integers[channel], steps[channel] = found, row @ found / (found @ found)  # least squares evens float32 out
    return integers, steps


def _grids(row: NDArray[np.float64]) -> Iterator[int]:
    """Numbers n, the smallest first, such that all weights are multiples of the largest one divided by n."""
    relative = row / np.abs(row).max()
    probes = relative[np.abs(relative).argsort()[:: max(1, len(relative) // _PROBED)]]
    numbers = np.arange(1, _LARGEST_LEVEL)
    multiples = numbers[:, None] * probes
    close = np.abs(multiples - np.round(multiples)).max(1) <= numbers * _EXACT
    for number in numbers[close]:
        if np.abs(relative * number - np.round(relative * number)).max() <= number * _EXACT:
            yield int(number)
