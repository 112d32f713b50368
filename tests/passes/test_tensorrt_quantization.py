"""Static quantization as TensorRT takes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.passes.quantization import tensorrt
from hasten.passes.quantization.placement import Placement, relative_error
from hasten.passes.quantization.static import StaticQuantization


def _graph(folder: Path, arch: dict[str, object], shape: tuple[int, ...], classes: int) -> Graph:
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=shape),), output_shape=(classes,))
    module, arch = build(arch, signature.inputs, (classes,), seed=0)
    with torch.no_grad():
        module.train()(torch.tensor(_rows(16, shape)["input"]))
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, _rows(16, shape), folder)


def _rows(number: int, shape: tuple[int, ...], seed: int = 0) -> Columns:
    return {"input": np.random.default_rng(seed).standard_normal((number, *shape), dtype=np.float32)}


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A stem, a block with the identity beside it and one with a convolution beside it, and a linear layer."""
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}
    return _graph(tmp_path_factory.mktemp("residual"), arch, (3, 8, 8), 10)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One linear layer, 6 -> 4."""
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 4}
    return _graph(tmp_path_factory.mktemp("linear"), arch, (6,), 4)


def _run(file: Path, rows: Columns) -> np.ndarray:
    return onnxruntime.InferenceSession(file).run(None, dict(rows))[0]


def _producers(graph: onnx.GraphProto) -> dict[str, str]:
    return {name: node.op_type for node in graph.node for name in node.output}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("weights", "top"), [("s8", 127), ("s7", 63)])
def test_linear_layer_equals_symmetric_arithmetic_by_hand(
    linear: Graph, tmp_path: Path, per_channel: bool, weights: str, top: int
) -> None:
    calibration, rows = _rows(50, (6,))["input"], 2 * _rows(20, (6,), seed=1)["input"]
    method = StaticQuantization(calibration_rows=50, per_channel=per_channel, weights=weights)  # type: ignore[arg-type]
    method(linear, {"input": calibration}, "tensorrt", tmp_path)
    module = rebuild(linear.module)
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.weight, module.bias))
    x_scale = np.abs(calibration).max() / 127
    w_scale = np.abs(weight).max(axis=1 if per_channel else None, keepdims=True) / top
    x_integers = np.clip(np.round(rows / x_scale), -128, 127)
    expected = (x_integers @ np.round(weight / w_scale).T) * (x_scale * w_scale).reshape(-1) + bias
    outputs = _run(tmp_path / "model.onnx", {"input": rows})
    assert np.mean(np.isclose(outputs, expected, rtol=1e-4, atol=1e-4)) > 0.95  # all but ties


def test_numbers_have_a_sign_and_no_zero_point(residual: Graph, tmp_path: Path) -> None:
    StaticQuantization()(residual, _rows(40, (3, 8, 8)), "tensorrt", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            assert constants[node.input[2]] == np.int8(0)
    assert not any(values.dtype == np.uint8 for values in constants.values())


def test_a_residual_has_a_pair_and_the_convolution_that_it_is_added_to_has_none(
    residual: Graph, tmp_path: Path
) -> None:
    StaticQuantization()(residual, _rows(40, (3, 8, 8)), "tensorrt", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    made_by = _producers(graph)
    adds = [node for node in graph.node if node.op_type == "Add"]
    assert len(adds) == 2
    for node in adds:
        assert Counter(made_by[name] for name in node.input) == {"Conv": 1, "DequantizeLinear": 1}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 7
    for node in layers:
        assert [made_by[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert all(name not in made_by for name in node.input[2:]), "biases stay as they are"


def test_outputs_are_near_the_floats_and_weights_take_a_quarter(residual: Graph, tmp_path: Path) -> None:
    rows = _rows(40, (3, 8, 8))
    StaticQuantization()(residual, rows, "tensorrt", tmp_path)
    reference = _run(residual.onnx, rows)
    error = relative_error(tensorrt.outputs(tmp_path / "model.onnx", rows), reference)
    assert 0 < error < 0.1
    floats = [each for each in onnx.load(tmp_path / "model.onnx").graph.initializer if each.data_type == 1]
    assert max(int(np.prod(each.dims)) for each in floats) <= 16


def test_layers_that_are_kept_stay_floats(residual: Graph, tmp_path: Path) -> None:
    StaticQuantization(keep=("first", "last"))(residual, _rows(8, (3, 8, 8)), "tensorrt", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    made_by = _producers(graph)
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    whole = [node for node in layers if node.input[1] not in made_by]
    assert whole == [layers[0], layers[-1]]


def test_refuses_what_tensorrt_does_not_have(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"no unsigned weights: choose s8 or s7 \(quantization.weights\)"):
        tensorrt.place(linear, _rows(8, (6,)), Placement(weights="u8"), tmp_path / "model.onnx")
    with pytest.raises(PassError, match="no layer of the graph"):
        tensorrt.place(linear, _rows(8, (6,)), Placement(keep=("first",)), tmp_path / "model.onnx")
