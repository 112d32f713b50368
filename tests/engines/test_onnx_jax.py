"""Each ONNX operator as a JAX function, held against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.core.errors import EngineError
from hasten.engines import onnx_jax

pytest.importorskip("jax", reason="pip install 'hasten[xla]'")

DRAW = np.random.default_rng(0)
OPSET = 20


def floats(*shape: int) -> np.ndarray:
    return DRAW.standard_normal(shape, dtype=np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


class Case(NamedTuple):
    """One call of an operator: inputs that come with the request, then constants."""

    kind: str
    inputs: tuple[np.ndarray, ...]
    constants: tuple[np.ndarray | None, ...] = ()
    outputs: int = 1
    attributes: dict[str, Any] = {}  # noqa: RUF012


X = floats(2, 3, 6, 5)
SIGNS = floats(2, 7)
SEQUENCE = floats(5, 2, 4)
NAMES = """Abs Ceil Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu LogSoftmax Neg
    Reciprocal Relu Sigmoid Sign Sin Softmax Softplus Tanh"""
ONE = tuple(Case(kind, (SIGNS,)) for kind in NAMES.split())
TWO = tuple(Case(kind, (SIGNS, floats(2, 1))) for kind in ("Add", "Div", "Max", "Min", "Mul", "Sub"))
COMPARED = tuple(
    Case(kind, (SIGNS.round(), floats(1, 7).round()))
    for kind in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
)
RECURRENT = tuple(
    Case(
        kind,
        (SEQUENCE,),
        (floats(directions, gates * 3, 4), floats(directions, gates * 3, 3), floats(directions, 2 * gates * 3)),
        states + 1,
        {"hidden_size": 3, "direction": direction, **extra},
    )
    for kind, gates, states, extra in (
        ("LSTM", 4, 2, {}),
        ("GRU", 3, 1, {"linear_before_reset": 1}),
        ("RNN", 1, 1, {}),
    )
    for direction, directions in (("forward", 1), ("reverse", 1), ("bidirectional", 2))
)
CASES = (
    *ONE,
    *TWO,
    *COMPARED,
    *RECURRENT,
    Case("And", (SIGNS > 0, SIGNS < 1)),
    Case("Or", (SIGNS > 0, SIGNS < 1)),
    Case("Not", (SIGNS > 0,)),
    Case("ArgMax", (SIGNS,), attributes={"axis": 1, "keepdims": 0}),
    Case("AveragePool", (X,), attributes={"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("AveragePool", (X,), attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("BatchNormalization", (X,), (floats(3), floats(3), floats(3), np.abs(floats(3)))),
    Case("Cast", (SIGNS,), attributes={"to": TensorProto.INT32}),
    Case("Clip", (SIGNS,), (np.float32(-0.5), np.float32(0.5))),
    Case("Clip", (SIGNS,), (np.float32(0),)),
    Case("Concat", (SIGNS, floats(2, 2)), attributes={"axis": 1}),
    Case("Conv", (X,), (floats(4, 3, 3, 3), floats(4)), attributes={"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("Conv", (X,), (floats(6, 1, 3, 3),), attributes={"group": 3, "dilations": [2, 1], "pads": [2, 0, 2, 1]}),
    Case("Conv", (X,), (floats(4, 3, 3, 2),), attributes={"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", (floats(2, 3, 9),), (floats(4, 3, 3),), attributes={"auto_pad": "SAME_LOWER"}),
    Case("Conv", (floats(1, 2, 4, 4, 4),), (floats(3, 2, 2, 2, 2),)),
    Case("Expand", (floats(3, 1),), (ints(2, 1, 4),)),
    Case("Flatten", (X,), attributes={"axis": 2}),
    Case("Gather", (SIGNS,), (ints(3, -1, 0),), attributes={"axis": 1}),
    Case("Gelu", (SIGNS,), attributes={"approximate": "tanh"}),
    Case("Gemm", (floats(2, 4),), (floats(3, 4), floats(3)), attributes={"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", (floats(4, 2),), (floats(4, 3),), attributes={"transA": 1}),
    Case("GlobalAveragePool", (X,)),
    Case("InstanceNormalization", (X,), (floats(3), floats(3))),
    Case("IsNaN", (np.array([1, np.nan], np.float32),)),
    Case("LayerNormalization", (X,), (floats(6, 5), floats(6, 5)), attributes={"axis": 2}),
    Case("LayerNormalization", (SIGNS,), (floats(7),)),
    Case("Log", (np.abs(SIGNS),)),
    Case("MatMul", (floats(2, 1, 3, 4), floats(5, 4, 2))),
    Case("MaxPool", (X,), attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", (X,), attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Case("Pad", (X,), (ints(0, 0, 1, 0, 0, 1, 0, 2), np.float32(0.5))),
    Case("Pad", (X,), (ints(1, 2), None, ints(-1)), attributes={"mode": "reflect"}),
    Case("PRelu", (X,), (floats(3, 1, 1),)),
    Case("Pow", (np.abs(SIGNS),), (np.float32(1.5),)),
    Case("ReduceMax", (X,), (ints(1, -1),), attributes={"keepdims": 0}),
    Case("ReduceMean", (X,), (ints(2, 3),)),
    Case("ReduceMin", (X,)),
    Case("ReduceProd", (SIGNS,), (ints(1),)),
    Case("ReduceSum", (X,), (ints(),), attributes={"noop_with_empty_axes": 1}),
    Case("Reshape", (X,), (ints(0, -1, 5),)),
    Case("Slice", (X,), (ints(1, -1), ints(2**62, -4), ints(2, 3), ints(2, -1))),
    Case("Slice", (X,), (ints(-1), ints(-(2**62)), ints(2), ints(-2))),
    Case("Softmax", (X,), attributes={"axis": 1}),
    Case("Split", (SIGNS,), (ints(2, 5),), outputs=2, attributes={"axis": 1}),
    Case("Split", (SIGNS,), outputs=3, attributes={"axis": 1, "num_outputs": 3}),
    Case("Sqrt", (np.abs(SIGNS),)),
    Case("Squeeze", (floats(2, 1, 3),), (ints(1),)),
    Case("Tile", (SIGNS,), (ints(2, 3),)),
    Case("Transpose", (X,), attributes={"perm": [0, 2, 3, 1]}),
    Case("Unsqueeze", (SIGNS,), (ints(0, 3),)),
    Case("Where", (SIGNS > 0, SIGNS, floats(2, 1))),
)


def _model(case: Case, file: Path) -> onnx.ModelProto:
    """The operator alone, with every output."""
    given = [f"input{place}" for place in range(len(case.inputs))]
    fixed = [f"constant{place}" if each is not None else "" for place, each in enumerate(case.constants)]
    made = [f"output{place}" for place in range(case.outputs)]
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.bool_): TensorProto.BOOL}
    graph = helper.make_graph(
        [helper.make_node(case.kind, [*given, *fixed], made, **case.attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, types[each.dtype], each.shape)
            for name, each in zip(given, case.inputs, strict=True)
        ],
        [helper.make_empty_tensor_value_info(name) for name in made],
        [
            numpy_helper.from_array(np.asarray(each), name)
            for name, each in zip(fixed, case.constants, strict=True)
            if each is not None
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model)
    onnx.save(inferred, file)
    return inferred


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}{place}" for place, case in enumerate(CASES)])
def test_an_operator_gives_what_it_gives_in_onnx_runtime(case: Case, tmp_path: Path) -> None:
    model = _model(case, tmp_path / "one.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(
        None, {source.name: each for source, each in zip(model.graph.input, case.inputs, strict=True)}
    )
    for place, values in enumerate(expected):
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        first = moved.graph.output[place]
        del moved.graph.output[:]
        moved.graph.output.append(first)
        onnx.save(moved, tmp_path / "moved.onnx")
        found = np.asarray(onnx_jax.to_jax(tmp_path / "moved.onnx", "float32")(*case.inputs))
        assert found.shape == values.shape
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)


def test_every_operator_of_the_table_is_held_against_onnx_runtime() -> None:
    known = set(onnx_jax._OPERATORS)
    shapes = {"Constant", "ConstantOfShape", "Range", "Shape"}  # known while tracing: test_xla runs models with them
    assert known - shapes == {case.kind for case in CASES}


def test_an_operator_that_is_not_in_the_table_is_named(tmp_path: Path) -> None:
    _model(Case("Hardmax", (SIGNS,)), tmp_path / "one.onnx")
    with pytest.raises(EngineError, match="xla knows no ONNX operator Hardmax; it knows Abs, Add"):
        onnx_jax.to_jax(tmp_path / "one.onnx", "float32")


def test_rounds_factors_and_not_sums_in_bfloat16(tmp_path: Path) -> None:
    left, right = np.full((1, 300), 1 + 2**-9, np.float32), np.ones((300, 1), np.float32)
    _model(Case("MatMul", (left,), (right,)), tmp_path / "one.onnx")
    # 1 + 2^-9 rounds to 1 in 8 bits of mantissa; 300 ones add up to 300, which a bfloat16 sum would miss.
    assert np.asarray(onnx_jax.to_jax(tmp_path / "one.onnx", "bfloat16")(left)) == 300
    np.testing.assert_allclose(onnx_jax.to_jax(tmp_path / "one.onnx", "float32")(left), 300 * (1 + 2**-9))
