"""The own ranges of activations for torchao."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.ranges import Histogram


class RangeObserver(UniformQuantizationObserverBase):  # type: ignore[misc]
    """Counts the activations that pass, for the range that the placement asks for."""

    def __init__(self, placement: Placement, dtype: torch.dtype, qscheme: torch.qscheme, **others: object) -> None:
        super().__init__(dtype=dtype, qscheme=qscheme, **others)
        self._placement = placement
        self._histogram = Histogram()

    def forward(self, values: Tensor) -> Tensor:
        self._placement.observe(self._histogram, values.detach().numpy())
        return values

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scale, zero = self._calculate_qparams(*map(torch.tensor, self._placement.range(self._histogram)))
        return scale, zero
