"""A float ONNX graph in 16 bits, for engines that calculate in the types that they find in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx

Half = Literal["float16", "bfloat16"]

_STAYS_FLOAT = {"Resize": (2,)}
"""Operator -> places of the inputs that ONNX wants in float32 whatever the others are."""
_BFLOAT16_OPSET = 22
"""The first in which convolutions and pooling take bfloat16."""
_LARGEST = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}


def halved(model: onnx.ModelProto, precision: Half) -> onnx.ModelProto:
    """The graph with weights and activations in 16 bits; its inputs and outputs stay as they are.

    Weights are rounded to the nearest, and those beyond the largest number (a mask's -3.4e38) become that one: as
    infinities they would make rows of a softmax that mask all of their elements undefined.
    """
    import onnx
    import onnx.version_converter

    narrow = onnx.ModelProto()
    narrow.CopyFrom(model)
    if precision == "bfloat16" and _opset(narrow) < _BFLOAT16_OPSET:
        narrow = onnx.version_converter.convert_version(narrow, _BFLOAT16_OPSET)
    kept = {node.input[place] for node in _nodes(narrow.graph) for place in _float_places(node)}
    outer, *inner = _graphs(narrow.graph)
    for graph in (outer, *inner):
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in kept:
                tensor.CopyFrom(_rounded(tensor, precision))
        graph.ClearField("value_info")  # of the types that they had
    for value in (value for graph in inner for value in (*graph.input, *graph.output)):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = _type(precision)
    for node in _nodes(narrow.graph):
        if kept.isdisjoint(node.output):
            _retype(node, precision)
    _cast_at_the_edges(narrow.graph, _type(precision))
    return narrow


def _opset(model: onnx.ModelProto) -> int:
    return next(int(each.version) for each in model.opset_import if each.domain in ("", "ai.onnx"))


def _type(precision: Half) -> int:
    import onnx

    return int({"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[precision])


def _float_places(node: onnx.NodeProto) -> list[int]:
    return [place for place in _STAYS_FLOAT.get(node.op_type, ()) if place < len(node.input) and node.input[place]]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node


def _retype(node: onnx.NodeProto, precision: Half) -> None:
    """Lets a node that makes floats out of itself make those of 16 bits, in place."""
    import onnx

    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t, precision))
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = _type(precision)
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32))
            attribute.CopyFrom(onnx.helper.make_attribute("value", _rounded(tensor, precision)))


def _cast_at_the_edges(graph: onnx.GraphProto, half: int) -> None:
    import onnx

    before, after = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            name = f"{value.name}/half"
            _rename(graph, value.name, name)
            before.append(onnx.helper.make_node("Cast", [value.name], [name], to=half))
    for value in graph.output:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            name = f"{value.name}/half"
            _rename(graph, value.name, name)
            after.append(onnx.helper.make_node("Cast", [name], [value.name], to=onnx.TensorProto.FLOAT))
    nodes = [*before, *graph.node, *after]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _rounded(tensor: onnx.TensorProto, precision: Half) -> onnx.TensorProto:
    import onnx

    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(_type(precision))
    values = np.clip(onnx.numpy_helper.to_array(tensor), -_LARGEST[precision], _LARGEST[precision])
    return onnx.numpy_helper.from_array(values.astype(dtype), tensor.name)
