"""Correction of biases for what quantized weights shift on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hasten.core.interfaces import Columns
from hasten.passes.quantization.layers import (
    OUTPUTS_FIRST,
    Layer,
    bias,
    end,
    kept,
    layers,
    operator,
    tensor,
)
from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.simulation import ChannelMeans, Simulation, channel_mean


def correct_biases(captured: GraphModule, rows: Columns, placement: Placement) -> tuple[int, int]:
    """Takes the mean error of each output channel of each quantized layer off its bias, in place.

    Empirical bias correction (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias
    Correction, section 4.2 and appendix D): the network runs on the rows with quantized weights; in the order of the
    layers, the mean of each output channel is compared with that of the floats, and corrected before the next layer
    sees it. The bias of a layer with batch normalization is that of the normalization.

    Returns:
        How many layers were corrected, and how many have no bias to be corrected.
    """
    found = layers(captured)
    keep = kept(placement.keep, [layer.path for layer in found])
    quantized = [layer for layer in found if layer.path not in keep and operator(layer.node) in OUTPUTS_FIRST]
    biases = {end(layer.node): bias(layer.node) for layer in quantized}
    ends = {node: name for node, name in biases.items() if name is not None}
    floats = ChannelMeans(captured, placement, list(ends))
    floats.outputs(rows)
    corrected = _Corrected(captured, placement, quantized, floats.means)
    corrected.outputs(rows)
    with torch.no_grad():
        for node, name in ends.items():
            tensor(captured, name).sub_(corrected.shifts[node].flatten())
    return len(ends), len(biases) - len(ends)


class _Corrected(Simulation):
    """Moves every channel back to its mean; `shifts` says by how much it was off."""

    def __init__(
        self, captured: GraphModule, placement: Placement, quantized: list[Layer], means: dict[Node, Tensor]
    ) -> None:
        super().__init__(captured, placement, quantized)
        self._means = means
        self.shifts: dict[Node, Tensor] = {}

    def observed(self, node: Node, value: Any) -> Any:
        if node not in self._means:
            return value
        self.shifts[node] = channel_mean(node, value) - self._means[node]
        return value - self.shifts[node]
