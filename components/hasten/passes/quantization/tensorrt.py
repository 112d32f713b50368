"""Static quantization placed for TensorRT, whose integers have a sign and no zero point but 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hasten.artefacts.capture import write_onnx
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph
from hasten.passes.quantization.layers import onnx_layers
from hasten.passes.quantization.onnxruntime import activation_ranges, exact_outputs, kept_node_names
from hasten.passes.quantization.placement import Placement, Weights

WITHOUT_VNNI: tuple[Weights, ...] = ("s8",)
"""The processor of this machine does not matter: a GPU sums 8-bit products in 32 bits."""
_STEPS = 127


def place(graph: Graph, rows: Columns, placement: Placement, file: Path) -> None:
    """Writes the graph with pairs in front of every layer and of what is added to its outputs.

    Weights are stored as integers. Biases stay float: TensorRT adds them within the layer. Where a residual is added to
    the outputs of a layer, the residual gets a pair and the outputs none, so that both become one kernel ("Q/DQ Layer-
    Placement Recommendations" in TensorRT's developer guide).

    Raises:
        PassError: the weights are unsigned, no layer can be quantized, or there is no layer that is to be kept.
    """
    if placement.weights == "u8":
        raise PassError("TensorRT has no unsigned weights: choose s8 or s7 (quantization.weights)")
    model = onnx.load(graph.onnx)
    keep = kept_node_names(graph, model, placement)
    weights = {each.name: each for each in model.graph.initializer}
    nodes = [node for node in onnx_layers(model) if node.name not in keep and _axis(node, weights) is not None]
    if not nodes:
        raise PassError("quantization=static: no layer of the graph reads its weights in a way that TensorRT quantizes")
    residuals = {(node.name, place): node.input[place] for node, place in _residuals(model, nodes)}
    inputs = {(node.name, 0): node.input[0] for node in nodes}
    pairs = inputs | residuals
    ranges = activation_ranges(model, sorted(set(pairs.values())), rows, placement)
    made = {name: _pair(name, *ranges[name]) for name in sorted(ranges)}
    for node in model.graph.node:
        for place in range(len(node.input)):
            if (node.name, place) in pairs:
                node.input[place] = _output(node.input[place])
    integers = _quantized_weights(model, nodes, placement)
    _insert(model.graph, [*made.values(), *integers])
    write_onnx(model, file)


def outputs(file: Path, rows: Columns) -> NDArray[np.float32]:
    """What the pairs ask for, calculated on this machine's processor as they are written."""
    return exact_outputs(file, rows)


Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]
"""Nodes and the constants that they read."""


def _axis(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> int | None:
    """The axis of the second input that holds the outputs' channels; None where that is no weight, or no such layer."""
    if len(node.input) < 2 or node.input[1] not in weights:
        return None
    if node.op_type == "Gemm":
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        return 0 if attributes.get("transB") else 1
    if node.op_type == "MatMul":
        return len(weights[node.input[1]].dims) - 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)


def _residuals(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Sums of a convolution's outputs, which nothing else reads, with something computed: the place of the latter."""
    convolutions = {node.output[0] for node in nodes if node.op_type == "Conv"}
    readers = [name for node in model.graph.node for name in node.input]
    computed = {name for node in model.graph.node for name in node.output} | {each.name for each in model.graph.input}
    for node in model.graph.node:
        alone = [name in convolutions and readers.count(name) == 1 for name in node.input]
        if node.op_type == "Add" and any(alone):
            other = 1 - max(place for place, is_alone in enumerate(alone) if is_alone)
            if node.input[other] in computed:
                yield node, other


def _pair(name: str, low: float, high: float) -> Part:
    scale = float(max(abs(low), abs(high))) / _STEPS or 1.0
    constants = [
        numpy_helper.from_array(np.float32(scale), f"{name}/scale"),
        numpy_helper.from_array(np.int8(0), f"{name}/zero"),
    ]
    read = [each.name for each in constants]
    quantize = helper.make_node("QuantizeLinear", [name, *read], [f"{name}/integers"])
    dequantize = helper.make_node("DequantizeLinear", [f"{name}/integers", *read], [_output(name)])
    return [quantize, dequantize], constants


def _output(name: str) -> str:
    return f"{name}/dequantized"


def _quantized_weights(model: onnx.ModelProto, nodes: list[onnx.NodeProto], placement: Placement) -> list[Part]:
    """Turns the weights of the layers into integers, in place, and gives what turns them back."""
    weights = {each.name: each for each in model.graph.initializer}
    largest = 2 ** (placement.weight_bits - 1) - 1
    made: dict[tuple[str, int | None], Part] = {}
    for node in nodes:
        name, axis = node.input[1], _axis(node, weights) if placement.per_channel else None
        values = numpy_helper.to_array(weights[name]).astype(np.float32)
        others = tuple(each for each in range(values.ndim) if each != axis)
        scales = np.abs(values).max(axis=others, keepdims=True) / np.float32(largest)
        scales[scales == 0] = 1
        integers = np.clip(np.rint(values / scales), -largest, largest).astype(np.int8)
        own = f"{name}/{'all' if axis is None else axis}"
        constants = [
            numpy_helper.from_array(integers, f"{own}/integers"),
            numpy_helper.from_array(scales.reshape(-1) if axis is not None else scales.reshape(()), f"{own}/scale"),
        ]
        settings = {} if axis is None else {"axis": axis}
        back = helper.make_node("DequantizeLinear", [each.name for each in constants], [_output(own)], **settings)
        made[name, axis] = [back], constants
        node.input[1] = _output(own)
    read = {name for node in model.graph.node for name in node.input}
    left = [each for each in model.graph.initializer if each.name in read]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(left)
    return list(made.values())


def _insert(graph: onnx.GraphProto, parts: list[Part]) -> None:
    """Puts nodes behind what they read and before what reads them: ONNX wants that order."""
    waiting = [node for nodes, _ in parts for node in nodes]
    known = {each.name for each in graph.input} | {"", *(each.name for each in graph.initializer)}
    for _, constants in parts:
        graph.initializer.extend(constants)
        known.update(each.name for each in constants)
    ordered: list[onnx.NodeProto] = []
    for node in [None, *graph.node]:
        if node is not None:
            ordered.append(node)
            known.update(node.output)
        while ready := [each for each in waiting if known.issuperset(each.input)]:
            ordered += ready
            known.update(name for each in ready for name in each.output)
            waiting = [each for each in waiting if each not in ready]
    assert not waiting
    graph.ClearField("node")
    graph.node.extend(ordered)
