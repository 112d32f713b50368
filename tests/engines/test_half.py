"""Graphs in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from hasten.core.interfaces import Graph
from hasten.engines.half import Half, halved

TYPES: dict[Half, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
each_precision = pytest.mark.parametrize("precision", TYPES)


def _model(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _inferred(model: onnx.ModelProto) -> dict[str, int]:
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in graph.value_info}


@each_precision
@pytest.mark.parametrize("name", ["graph", "reader"])
def test_layers_calculate_in_16_bits_and_the_ends_stay(
    precision: Half, name: str, request: pytest.FixtureRequest
) -> None:
    source: Graph = request.getfixturevalue(name)
    model = onnx.load(source.onnx)
    before = model.SerializeToString()
    narrow = halved(model, precision)
    assert model.SerializeToString() == before
    types = _inferred(narrow)
    assert TensorProto.FLOAT not in types.values()
    assert TYPES[precision] in types.values()
    assert {each.data_type for each in narrow.graph.initializer} & {TensorProto.FLOAT, TYPES[precision]} == {
        TYPES[precision]
    }
    for ends in ("input", "output"):
        assert list(getattr(narrow.graph, ends)) == list(getattr(model.graph, ends))


@pytest.mark.parametrize("name", ["graph", "reader"])
def test_gives_what_the_float_graph_gives_within_the_rounding(name: str, request: pytest.FixtureRequest) -> None:
    source: Graph = request.getfixturevalue(name)
    reference = load_file(source.reference)
    session = onnxruntime.InferenceSession(halved(onnx.load(source.onnx), "float16").SerializeToString())
    (given,) = session.run(None, {each: reference[f"inputs.{each}"] for each in source.signature.names})
    assert given.dtype == np.float32
    error = np.abs(given - reference["outputs"]).max()
    assert 0 < error < 5e-3 * np.ptp(reference["outputs"])


@each_precision
def test_what_is_too_large_becomes_the_largest_number(precision: Half) -> None:
    model = _model(helper.make_node("Add", ["input", "mask"], ["output"]), mask=np.array([np.finfo("f4").min, 1 / 3]))
    (mask,) = halved(model, precision).graph.initializer
    largest, third = numpy_helper.to_array(mask).astype(np.float64)
    assert largest == {"float16": -65504.0, "bfloat16": -float(0xFF << 120)}[precision]
    assert third == pytest.approx(1 / 3, rel={"float16": 2**-11, "bfloat16": 2**-8}[precision])
    assert third != 1 / 3


@each_precision
def test_floats_that_a_node_makes_are_of_16_bits_too(precision: Half) -> None:
    model = _model(
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["input", "two"], ["doubled"]),
        helper.make_node("Shape", ["doubled"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.ones(1, "f4"))),
        helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["doubled", "ones"], ["sum"]),
        helper.make_node("Add", ["sum", "sizes"], ["output"]),
    )
    types = _inferred(halved(model, precision))
    assert {types[name] for name in ("two", "doubled", "ones", "sizes", "sum")} == {TYPES[precision]}


def test_a_graph_within_a_node_follows() -> None:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Add", ["input", f"by_{name}"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.full(2, by, np.float32), f"by_{name}")],
        )
        for name, by in (("then", 1), ("else", -1))
    }
    condition = numpy_helper.from_array(np.array(True))
    model = _model(
        helper.make_node("Constant", [], ["condition"], value=condition),
        helper.make_node("If", ["condition"], ["output"], **branches),
    )
    session = onnxruntime.InferenceSession(halved(model, "float16").SerializeToString())
    (given,) = session.run(None, {"input": np.zeros((1, 2), np.float32)})
    np.testing.assert_array_equal(given, np.ones((1, 2)))


def test_scales_of_a_resize_stay_floats() -> None:
    model = _model(
        helper.make_node("Resize", ["input", "", "scales"], ["output"], mode="nearest"), scales=np.array([1.0, 2.0])
    )
    assert halved(model, "float16").graph.initializer[0].data_type == TensorProto.FLOAT
