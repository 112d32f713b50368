from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.passes.quantization import dynamic
from hasten.passes.quantization.dynamic import DynamicQuantization


class Recurrent(nn.Module):
    """An LSTM over a series of five values, and its last state's linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(5, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.memory(series)[0][:, -1])


class ConvolutionsAndOneLayer(nn.Sequential):
    def __init__(self) -> None:
        narrowing = [layer for width in (1, 4, 4) for layer in (nn.Conv2d(width, 4, 3, stride=2, padding=1), nn.ReLU())]
        super().__init__(*narrowing, nn.Flatten(), nn.Linear(4, 3))


def _graph(folder: Path, arch: dict[str, object], shape: tuple[int, ...]) -> Graph:
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=shape),), output_shape=(3,))
    module, arch = build(arch, signature.inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, _rows(16, shape), folder)


def _rows(number: int, shape: tuple[int, ...], seed: int = 0) -> Columns:
    return {"input": np.random.default_rng(seed).standard_normal((number, *shape), dtype=np.float32)}


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One linear layer, 6 -> 3."""
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 3}
    return _graph(tmp_path_factory.mktemp("linear"), arch, (6,))


def _run(file: Path, rows: Columns) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, dict(rows))[0]


def _compiled(graph: Graph, file: Path, folder: Path) -> OnnxRuntime:
    engine = OnnxRuntime()
    engine.compile(replace(graph, onnx=file, quantized=True), folder)
    return engine


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("weights", "top"), [("s7", 64), ("s8", 127)])
@pytest.mark.parametrize("factor", [1, 100])
def test_a_linear_layer_equals_affine_arithmetic_by_hand(
    linear: Graph, tmp_path: Path, per_channel: bool, weights: str, top: int, factor: int
) -> None:
    DynamicQuantization(per_channel=per_channel, weights=weights)(linear, {}, "onnxruntime", tmp_path)
    rows = factor * _rows(20, (6,), seed=1)["input"]
    module = rebuild(linear.module)
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.weight, module.bias))
    low, high = min(0.0, float(rows.min())), max(0.0, float(rows.max()))
    x_scale = (high - low) / 255
    x_integers = np.clip(np.round(rows / x_scale) + np.round(-low / x_scale), 0, 255) - np.round(-low / x_scale)
    w_scale = np.abs(weight).max(axis=1 if per_channel else None, keepdims=True) / top
    expected = x_integers @ np.round(weight / w_scale).T * (x_scale * w_scale).reshape(-1) + bias
    np.testing.assert_allclose(_run(tmp_path / "model.onnx", {"input": rows}), expected, rtol=1e-4, atol=1e-4 * factor)


@pytest.mark.parametrize(("vnni", "highest"), [(True, 127), (False, 64)])
def test_takes_seven_bits_for_weights_where_sums_would_saturate(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool, highest: int
) -> None:
    monkeypatch.setattr(dynamic, "has_vnni", lambda: vnni)
    DynamicQuantization()(linear, {}, "onnxruntime", tmp_path)
    (weight,) = (
        numpy_helper.to_array(each)
        for each in onnx.load(tmp_path / "model.onnx").graph.initializer
        if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2
    )
    assert np.abs(weight.astype(int)).max() == highest


@pytest.mark.parametrize(("operators", "share"), [(("MatMul", "Gemm", "LSTM"), 1 / 4), (("Conv",), 3 / 4)])
def test_knows_beforehand_how_many_layers_can_run_in_integers(
    tmp_path: Path, operators: tuple[str, ...], share: float
) -> None:
    arch = {"_target_": f"{__name__}.ConvolutionsAndOneLayer"}
    graph = _graph(tmp_path, arch, (1, 8, 8))
    assert DynamicQuantization(operators=operators).integer_share(graph) == share
    for folder in ("quantized", "compiled"):
        (tmp_path / folder).mkdir()
    DynamicQuantization(operators=operators)(graph, {}, "onnxruntime", tmp_path / "quantized")
    engine = _compiled(graph, tmp_path / "quantized" / "model.onnx", tmp_path / "compiled")
    assert engine.integer_share(tmp_path / "compiled") <= share


def test_runs_every_linear_layer_of_a_transformer_in_integers(
    reader: Graph, many_texts: Columns, tmp_path: Path
) -> None:
    DynamicQuantization()(reader, {}, "onnxruntime", tmp_path)
    (tmp_path / "compiled").mkdir()
    engine = _compiled(reader, tmp_path / "model.onnx", tmp_path / "compiled")
    assert engine.integer_share(tmp_path / "compiled") == 1
    run, module = engine.load(tmp_path / "compiled"), rebuild(reader.module)
    for length in (8, 3):
        rows = {name: values[:, :length] for name, values in many_texts.items()}
        with torch.no_grad():
            expected = module(**{name: torch.tensor(values) for name, values in rows.items()}).numpy()
        np.testing.assert_allclose(run(*rows.values()), expected, atol=0.05 * np.ptp(expected))


@pytest.mark.filterwarnings("ignore:.*_flat_weights.*")
def test_takes_recurrent_layers_too(tmp_path: Path) -> None:
    graph = _graph(tmp_path, {"_target_": f"{__name__}.Recurrent"}, (12, 5))
    (tmp_path / "quantized").mkdir()
    DynamicQuantization()(graph, {}, "onnxruntime", tmp_path / "quantized")
    types = [node.op_type for node in onnx.load(tmp_path / "quantized" / "model.onnx").graph.node]
    assert "DynamicQuantizeLSTM" in types
    assert "LSTM" not in types
    rows = _rows(20, (12, 5), seed=1)
    expected = _run(graph.onnx, rows)
    outputs = _run(tmp_path / "quantized" / "model.onnx", rows)
    np.testing.assert_allclose(outputs, expected, atol=0.05 * np.ptp(expected))


def test_takes_the_tables_of_embeddings_where_they_are_asked_for(
    reader: Graph, many_texts: Columns, tmp_path: Path
) -> None:
    for name, operators in (("without", ("MatMul",)), ("with", ("MatMul", "Gather"))):
        (tmp_path / name).mkdir()
        DynamicQuantization(operators=operators)(reader, {}, "onnxruntime", tmp_path / name)
    without, tables = (
        {each.name: each.data_type for each in onnx.load(tmp_path / name / "model.onnx").graph.initializer}
        for name in ("without", "with")
    )
    assert without["embedding.weight"] == onnx.TensorProto.FLOAT
    assert "embedding.weight" not in tables
    np.testing.assert_allclose(
        _run(tmp_path / "with" / "model.onnx", many_texts), _run(reader.onnx, many_texts), atol=0.05
    )


def test_gives_the_same_bytes_again(reader: Graph, tmp_path: Path) -> None:
    before = reader.onnx.read_bytes()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        DynamicQuantization()(reader, {}, "onnxruntime", tmp_path / name)
        assert [file.name for file in (tmp_path / name).iterdir()] == ["model.onnx"]
    assert (tmp_path / "one" / "model.onnx").read_bytes() == (tmp_path / "two" / "model.onnx").read_bytes()
    assert reader.onnx.read_bytes() == before


@pytest.mark.parametrize("family", ["openvino", "eager"])
def test_is_for_onnxruntime_alone(linear: Graph, tmp_path: Path, family: str) -> None:
    wanted = f"quantization=dynamic is for onnxruntime, not for {family}: choose engine=onnxruntime"
    with pytest.raises(PassError, match=wanted):
        DynamicQuantization()(linear, {}, family, tmp_path)
    assert f"engine={family}" in DynamicQuantization.never_with


def test_refuses_a_graph_without_such_layers(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"no constant weights in Conv, Gather \(quantization\.operators\)"):
        DynamicQuantization(operators=("Conv", "Gather"))(linear, {}, "onnxruntime", tmp_path)
    assert not list(tmp_path.iterdir())


def test_needs_no_rows() -> None:
    assert DynamicQuantization().calibration_rows == 0


def test_leaves_logging_as_it_was(linear: Graph, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters), root.level
    DynamicQuantization()(linear, {}, "onnxruntime", tmp_path)
    assert (list(root.handlers), list(root.filters), root.level) == before
    assert capfd.readouterr() == ("", "")
