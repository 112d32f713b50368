"""Where affine quantization puts the ends of its range: min-max, percentile, least squared error, entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Method = Literal["minmax", "percentile", "mse", "entropy"]

_BINS = 4096
"""Of one sign. At least half of those of the larger sign are in use, because a bin's width is a power of two."""
_SHRINKING = 0.5 ** (np.arange(96) / 12)
"""Shares of the whole range that are tried as clipping: 12 an octave, down to 1/240. The errors are flat around their
minimum."""
_SMOOTHING = 1e-6
"""Probability of what the quantized distribution has lost, so that its divergence stays finite."""


class Histogram:
    """Counts of values over a range that widens with what it sees, so that rows can come one batch after another.

    Bins are as wide as a power of two and begin at zero. Two histograms of different width fit into each other without
    loss, and the same values in any order and any batches give the same counts. Exact zeros are counted apart: every
    range represents them.

    Attributes:
        low: the smallest value seen, or 0 if none is below.
        high: the largest value seen, or 0 if none is above.
        zeros: how many values were exactly 0.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0
        self._width = 0.0
        self._counts = np.zeros(2 * _BINS, dtype=np.int64)

    def observe(self, values: ArrayLike) -> None:
        """Counts the values of an array or a CPU tensor without gradient, of any shape.

        Raises:
            ValueError: some are NaN or infinite.
        """
        flat = np.asarray(values, dtype=np.float64).ravel()
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("values have to be finite to be counted, got NaN or infinity")
        self._see(low, high)
        others = flat[flat != 0]
        self.zeros += flat.size - others.size
        if others.size:
            # The largest value of all would begin the bin after the last one.
            places = np.minimum(np.floor(others / self._width).astype(np.int64) + _BINS, 2 * _BINS - 1)
            self._counts += np.bincount(places, minlength=2 * _BINS)

    def merge(self, other: Histogram) -> None:
        """Adds what another histogram has seen."""
        self._see(other.low, other.high)
        counts, width = other._counts, other._width
        while 0 < width < self._width:
            counts, width = _halved(counts), 2 * width
        self._counts = self._counts + counts
        self.zeros += other.zeros

    def range(
        self, method: Method, bits: int = 8, *, symmetric: bool = False, percentile: float = 99.99
    ) -> tuple[float, float]:
        """The lowest and the highest value that are represented; what lies outside is clipped.

        `minmax` clips nothing. `percentile` clips that share of the values, the same share below as above. `mse` looks
        for the clipping with the least squared error of `fake_quantized` values. `entropy` looks for the one whose
        quantized distribution diverges least (Kullback-Leibler) from the clipped one (Migacz, 8-bit inference with
        TensorRT, GTC 2017); no range of fewer than 2^bits bins is looked at, so that from 13 bits on it clips nothing.

        Args:
            bits: of the quantized values; for `mse` and `entropy`.
            symmetric: make low = -high.
            percentile: share of the values inside, in percent; for `percentile`.

        Returns:
            low <= 0 <= high; both are 0 where nothing but zeros was seen.
        """
        high = max(-self.low, self.high)
        whole = (-high, high) if symmetric else (self.low, self.high)
        if method == "minmax" or whole[0] == whole[1]:
            return whole
        if method == "percentile":
            return self._percentile(percentile, symmetric)
        centres, counts = self._occupied()
        if method == "mse":

            def cost(low: float, high: float) -> float:
                error = fake_quantized(centres, low, high, bits, symmetric=symmetric) - centres
                return float(counts @ error**2)
        else:
            smallest = 2**bits * self._width

            def cost(low: float, high: float) -> float:
                if high - low < smallest and (low, high) != whole:
                    return np.inf
                return _divergence(centres, counts, low, high, bits, symmetric=symmetric)

        return _least(cost, whole, symmetric=symmetric)

    def _see(self, low: float, high: float) -> None:
        """Widens the bins until they hold the values from low to high."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-self.low, self.high)
        if largest == 0:
            return
        width = 2.0 ** np.ceil(np.log2(largest / _BINS))
        while 0 < self._width < width:
            self._counts, self._width = _halved(self._counts), 2 * self._width
        self._width = max(self._width, width)

    def _occupied(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Centres of the bins that hold values, none outside of what was seen, and how many they hold."""
        (places,) = np.nonzero(self._counts)
        centres = (places - _BINS + 0.5) * self._width
        return np.clip(centres, self.low, self.high), self._counts[places]

    def _percentile(self, percentile: float, symmetric: bool) -> tuple[float, float]:
        outside = 1 - percentile / 100
        below, above = self._counts[:_BINS][::-1], self._counts[_BINS:]
        total = int(self._counts.sum()) + self.zeros
        if symmetric:
            high = min(max(-self.low, self.high), self._tail(below + above, outside * total))
            return -high, high
        return (
            -min(-self.low, self._tail(below, outside / 2 * total)),
            min(self.high, self._tail(above, outside / 2 * total)),
        )

    def _tail(self, counts: NDArray[np.int64], share: float) -> float:
        """The distance from zero beyond which that many values lie; a bin's values are spread evenly over it.

        Args:
            counts: of the bins of one sign, the one beside zero first.
        """
        beyond = np.cumsum(counts[::-1])[::-1]
        place = int(np.searchsorted(-beyond, -share, side="left")) - 1
        if place < 0:  # fewer values have this sign
            return 0.0
        return float((place + (beyond[place] - share) / counts[place]) * self._width)


def channel_ranges(
    weight: ArrayLike,
    method: Method,
    bits: int = 8,
    *,
    axis: int | None,
    symmetric: bool = True,
    percentile: float = 99.99,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`Histogram.range` of a weight tensor for each of its channels.

    Args:
        axis: of the channels; None for one range for the whole tensor.

    Returns:
        low and high, of shape (num_channels,), or (1,) without an axis.
    """
    values = np.asarray(weight)
    rows = [values] if axis is None else list(np.moveaxis(values, axis, 0))
    ranges = []
    for row in rows:
        histogram = Histogram()
        histogram.observe(row)
        ranges.append(histogram.range(method, bits, symmetric=symmetric, percentile=percentile))
    low, high = np.array(ranges, dtype=np.float64).T
    return low, high


def grid(low: float, high: float, bits: int, *, symmetric: bool) -> tuple[float, int, int]:
    """Step and first and last integer of a range, with zero among the multiples of the step.

    An asymmetric range has 2^bits - 1 steps and is moved by less than half a step, so that zero lies on one of its
    levels (Jacob et al. 2018). A symmetric one has a step less, because an odd number of levels has zero in its middle.

    Returns:
        step, first <= 0 and last >= 0: x is represented by round(x / step), clipped to [first, last]. An empty range
        has a step of 1.
    """
    if symmetric:
        last = 2 ** (bits - 1) - 1
        return (high / last or 1.0), -last, last
    levels = 2**bits - 1
    step = (high - low) / levels or 1.0
    first = round(low / step)
    return step, first, first + levels


def fake_quantized(
    values: NDArray[np.float64], low: float, high: float, bits: int, *, symmetric: bool
) -> NDArray[np.float64]:
    """The values after quantization to `grid` and back."""
    step, first, last = grid(low, high, bits, symmetric=symmetric)
    return np.clip(np.round(values / step), first, last) * step


def _halved(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts in bins of twice the width, zero still in the middle."""
    pairs = counts.reshape(-1, 2).sum(1)
    return np.pad(pairs, _BINS // 2)


def _least(
    cost: Callable[[float, float], float], whole: tuple[float, float], *, symmetric: bool
) -> tuple[float, float]:
    """The range of the least cost: both ends shrunk together, then each one alone; of equals the wider."""
    low, high = whole
    best = min(((share * low, share * high) for share in _SHRINKING), key=lambda ends: cost(*ends))
    if symmetric or low == 0 or high == 0:
        return best
    best = min((best, *((best[0], share * high) for share in _SHRINKING)), key=lambda ends: cost(*ends))
    return min((best, *((share * low, best[1]) for share in _SHRINKING)), key=lambda ends: cost(*ends))


def _divergence(
    centres: NDArray[np.float64], counts: NDArray[Any], low: float, high: float, bits: int, *, symmetric: bool
) -> float:
    """KL(P || Q): P holds what is clipped in its outermost bins, Q spreads each level over the bins that it stands for.

    What is clipped is missing in Q, and with it the shape of what is left.
    """
    step, first, last = grid(low, high, bits, symmetric=symmetric)
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    kept = counts[inside].astype(np.float64)
    levels = np.clip(np.round(centres[inside] / step), first, last).astype(np.int64) - first
    quantized = (np.bincount(levels, kept) / np.maximum(np.bincount(levels), 1))[levels]
    clipped = kept.copy()
    clipped[0] += counts[centres < low].sum()
    clipped[-1] += counts[centres > high].sum()
    p = clipped / clipped.sum()
    q = np.maximum(quantized / quantized.sum(), _SMOOTHING)
    return float(p @ np.log(p / q))
