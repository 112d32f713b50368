"""Equalization of weights across layers, before they are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hasten.passes.quantization.layers import (
    OUTPUTS_FIRST,
    Layer,
    bias,
    folding,
    layers,
    name_of,
    normalization,
    operator,
    tensor,
)

_ROUNDS, _SETTLED = 40, 1e-3
"""A layer between two others is balanced with both in turn, until no channel is scaled by more than that share."""
_THROUGH = frozenset({"relu", "relu_", "dropout", "flatten"})
_POOLING = frozenset(f"{name}{axes}d" for name in ("max_pool", "avg_pool", "adaptive_avg_pool") for axes in (1, 2, 3))
"""Operators f with f(s x) = s f(x) for s > 0 that keep the channels apart; pooling does so behind convolutions."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two layers, of which the second reads the outputs of the first, channel by channel, and nothing else does."""

    first: Layer
    second: Layer


def equalize(captured: GraphModule) -> int:
    """Gives the channels between two layers the same largest weight in both, in place; the outputs stay what they are.

    Cross-layer equalization (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias
    Correction, eq. 11): channel i is divided by s_i = sqrt(r1_i / r2_i) in the first layer and multiplied by it in the
    second, where r are the largest absolute weights, batch normalization included. A bias counts as a weight of its
    channel, so that none outgrows them; the paper mends that afterwards.

    Returns:
        How many pairs of layers there are.
    """
    pairs = list(_pairs(captured))
    with torch.no_grad():
        for _ in range(_ROUNDS):
            if max([_balance(pair, captured) for pair in pairs], default=0.0) < _SETTLED:
                break
    return len(pairs)


def _pairs(captured: GraphModule) -> Iterator[_Pair]:
    found = {layer.node: layer for layer in layers(captured)}
    uses = Counter(layer.weight for layer in found.values())
    for first in found.values():
        reader = _reader(first)
        second = found.get(reader) if reader else None
        if second and uses[first.weight] == uses[second.weight] == 1 and _fit(first, second, captured):
            yield _Pair(first=first, second=second)


def _reader(first: Layer) -> Node | None:
    """The node that alone reads the layer's outputs, behind what keeps channels apart and their scale."""
    through = _THROUGH | (_POOLING if operator(first.node) != "linear" else frozenset())
    node = normalization(first.node) or first.node
    while len(node.users) == 1:
        source, (node,) = node, node.users
        if operator(node) not in through:
            return node if node.args[0] is source else None
    return None


def _fit(first: Layer, second: Layer, captured: GraphModule) -> bool:
    """Whether both read whole parameters, and each output of the first is one input channel of the second."""
    nodes = first.node, second.node
    if any(operator(node) not in OUTPUTS_FIRST or name_of(node.args[1]) is None for node in nodes):
        return False
    return len(tensor(captured, first.weight)) == len(_by_input(second, tensor(captured, second.weight)))


def _balance(pair: _Pair, captured: GraphModule) -> float:
    """Scales one pair; gives the largest share by which a channel was scaled."""
    first, second = pair.first, pair.second
    node = normalization(first.node)
    weight, shift = tensor(captured, first.weight), bias(first.node)
    largest = _largest(weight) * folding(first.node, captured).abs()
    if shift is not None:
        largest = torch.maximum(largest, tensor(captured, shift).abs())
    others = tensor(captured, second.weight)
    scaled = others * _along_outputs(folding(second.node, captured), others)
    ratio = largest / _largest(_by_input(second, scaled))
    scale = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1).sqrt()
    if node is None:
        weight.div_(_along_outputs(scale, weight))
    else:
        tensor(captured, str(name_of(node.args[1]))).div_(scale)
    if shift is not None:
        tensor(captured, shift).div_(scale)
    _by_input(second, others).mul_(_along_outputs(scale, _by_input(second, others)))
    return float((scale - 1).abs().max())


def _by_input(layer: Layer, weight: Tensor) -> Tensor:
    """A view of the weight (outputs, inputs, ...) whose first axis are the input channels of the layer.

    A depthwise convolution has (channels, 1, ...), and as many inputs as outputs.
    """
    groups = layer.node.args[6] if operator(layer.node) != "linear" and len(layer.node.args) > 6 else 1
    if groups == 1:
        return weight.transpose(0, 1)
    return weight if groups == len(weight) and weight.shape[1] == 1 else weight[:0]


def _largest(weight: Tensor) -> Tensor:
    """The largest absolute weight along the first axis."""
    return weight.abs().flatten(1).amax(1)


def _along_outputs(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.ndim - 1))
