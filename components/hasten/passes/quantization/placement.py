"""How static quantization is placed in a graph, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.core.interfaces import Columns
from hasten.passes.quantization.ranges import Histogram, Method

Weights = Literal["s8", "s7", "u8"]
"""8-bit weights with sign, those of 7 bits, and 8-bit ones whose zero is 128; all symmetric."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the quantize/dequantize pairs of a graph depend on, besides the engine.

    Attributes:
        ranges: how the ranges of activations are estimated; weights keep their largest value.
        percentile: share of the values inside of the range, in percent, for `ranges="percentile"`.
        per_channel: one weight scale per output channel instead of one per tensor.
        weights: their type.
        keep: layers that stay float, as `layers.kept` reads them.
    """

    ranges: Method = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    weights: Weights = "s8"
    keep: tuple[str, ...] = ()

    @property
    def weight_bits(self) -> int:
        return 7 if self.weights == "s7" else 8

    def observe(self, histogram: Histogram, values: NDArray[Any]) -> None:
        """Counts what a range is estimated from: its ends are enough where nothing is clipped."""
        clips = self.ranges != "minmax" and values.size
        histogram.observe(values if clips else [values.min(initial=0), values.max(initial=0)])

    def range(self, histogram: Histogram) -> tuple[float, float]:
        """The lowest and the highest activation that is represented."""
        return histogram.range(self.ranges, percentile=self.percentile)


def batches(rows: Columns, size: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The rows in their order, `size` at a time."""
    for start in range(0, len(next(iter(rows.values()))), size):
        yield {name: values[start : start + size] for name, values in rows.items()}


def relative_error(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
    """Root of the mean squared difference, as a share of the standard deviation of the reference over its rows.

    Both are (B, *output_shape). 0 is equality, 1 is as far off as the mean of the reference.
    """
    reference = reference.astype(np.float64)
    squared = np.mean((outputs - reference) ** 2)
    variance = np.mean((reference - reference.mean(0)) ** 2)
    return float(np.sqrt(squared / variance)) if variance else float(np.sqrt(squared))
