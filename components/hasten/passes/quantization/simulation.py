"""What 8-bit weights and activations do to a network, simulated in PyTorch's floats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from hasten.core.interfaces import Columns
from hasten.passes.quantization.layers import OUTPUTS_FIRST, Layer, folding, name_of, operator
from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.ranges import Histogram, grid


class Simulation(Interpreter):
    """A captured network with quantized weights, and inputs where their range is known, in some of its layers.

    Args:
        quantized: the layers that are quantized; those of other operators than `OUTPUTS_FIRST` are not.
        ranges: node of a layer -> lowest and highest value of its input; without one, the input stays float.
    """

    def __init__(
        self,
        captured: GraphModule,
        placement: Placement,
        quantized: Collection[Layer] = (),
        ranges: Mapping[Node, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(captured)
        self.captured = captured
        self._placement = placement
        self._quantized = {layer.node for layer in quantized if operator(layer.node) in OUTPUTS_FIRST}
        self._ranges = ranges or {}

    def outputs(self, rows: Columns) -> Tensor:
        """Of all rows (B, *shape) at once."""
        with torch.inference_mode():
            found: Tensor = self.run(*(torch.tensor(values) for values in rows.values()))
        return found

    def run_node(self, node: Node) -> Any:
        if node not in self._quantized:
            return self.observed(node, super().run_node(node))
        arguments, keywords = self.fetch_args_kwargs_from_env(node)
        values, weight, *others = arguments
        if node in self._ranges:
            values = _rounded(values, *grid(*self._ranges[node], 8, symmetric=False))
        weight = self._weight(node, weight)
        return self.observed(node, self.call_function(node.target, (values, weight, *others), keywords))

    def observed(self, node: Node, value: Any) -> Any:
        """What a node gives; for a subclass to look at, or to change."""
        return value

    def _weight(self, node: Node, weight: Tensor) -> Tensor:
        """To the nearest of the levels that the weight has with batch normalization folded in, and symmetric."""
        folded = folding(node, self.captured) if name_of(node.args[1]) else weight.new_ones(len(weight))
        scale = folded.abs().clamp_min(torch.finfo(weight.dtype).tiny).view(-1, *[1] * (weight.ndim - 1))
        rows = (weight * scale).abs().flatten(1).amax(1)
        highest = rows if self._placement.per_channel else rows.max().expand(len(rows))
        last = 2 ** (self._placement.weight_bits - 1) - 1
        step = (highest / last).clamp_min(torch.finfo(weight.dtype).tiny).view_as(scale) / scale
        rounded: Tensor = (weight / step).round().clamp(-last, last) * step
        return rounded


class InputRanges(Simulation):
    """Runs the floats, and counts what goes into each layer."""

    def __init__(self, captured: GraphModule, placement: Placement, observed: Collection[Layer]) -> None:
        super().__init__(captured, placement)
        self._histograms = {layer.node: Histogram() for layer in observed}

    def run_node(self, node: Node) -> Any:
        if node in self._histograms:
            values, *_ = self.fetch_args_kwargs_from_env(node)[0]
            self._placement.observe(self._histograms[node], values.numpy())
        return super().run_node(node)

    @property
    def ranges(self) -> dict[Node, tuple[float, float]]:
        return {node: self._placement.range(histogram) for node, histogram in self._histograms.items()}


class ChannelMeans(Simulation):
    """Runs the floats, and keeps the mean of each channel of some nodes."""

    def __init__(self, captured: GraphModule, placement: Placement, wanted: Collection[Node]) -> None:
        super().__init__(captured, placement)
        self.means = dict.fromkeys(wanted, torch.empty(0))

    def observed(self, node: Node, value: Any) -> Any:
        if node in self.means:
            self.means[node] = channel_mean(node, value)
        return value


def channel_mean(node: Node, value: Tensor) -> Tensor:
    """Of each channel that a node gives, over rows and places, with as many axes as the value has."""
    axis = value.ndim - 1 if operator(node) == "linear" else 1
    return value.mean([each for each in range(value.ndim) if each != axis], keepdim=True)


def _rounded(values: Tensor, step: float, first: int, last: int) -> Tensor:
    return (values / step).round().clamp(first, last) * step
