from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Columns, Engine, Graph, Input, Signature
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.openvino import OpenVino
from hasten.passes.quantization.weight_only import WeightOnlyQuantization, quantized

ENGINES = pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVino()], ids=["onnxruntime", "openvino"])


class Wide(nn.Module):
    """Two linear layers, the last without bias, over the pixels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(512, 128), nn.Linear(128, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.convolution(images)).flatten(1))))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("wide")
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=(1, 8, 8)),), output_shape=(3,))
    module, arch = build({"_target_": f"{__name__}.Wide"}, signature.inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, _rows(16), folder)


def _rows(number: int) -> Columns:
    return {"input": np.random.default_rng(0).standard_normal((number, 1, 8, 8), dtype=np.float32)}


def _outputs(engine: Engine, graph: Graph, file: Path, rows: Columns, folder: Path) -> np.ndarray:
    folder.mkdir()
    engine.compile(replace(graph, onnx=file, quantized=True), folder)
    return engine.load(folder)(*rows.values())


@ENGINES
@pytest.mark.parametrize(("bits", "group_size", "share", "error"), [(8, None, 0.27, 0.02), (4, 32, 0.18, 0.2)])
def test_the_file_shrinks_and_the_outputs_stay_near(
    wide: Graph, tmp_path: Path, engine: Engine, bits: int, group_size: int | None, share: float, error: float
) -> None:
    method = WeightOnlyQuantization(bits=bits, group_size=group_size)  # type: ignore[arg-type]
    (note,) = method(wide, {}, engine.family, tmp_path)
    file = tmp_path / "model.onnx"
    taken = file.stat().st_size / wide.onnx.stat().st_size
    assert taken < share
    assert note == f"3 weights are stored as integers: the graph has {taken:.0%} of its bytes"
    rows = _rows(64)
    with torch.no_grad():
        expected = rebuild(wide.module)(torch.tensor(rows["input"])).numpy()
    outputs = _outputs(engine, wide, file, rows, tmp_path / "compiled")
    assert 0 < np.sqrt(np.mean((outputs - expected) ** 2)) < error * expected.std()


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_and_scales_equal_those_by_hand(bits: int) -> None:
    last = {8: 127, 4: 7}[bits]
    weight = np.array([[1.0, -0.49, 0.2], [0.0, 0.0, 0.0]], dtype=np.float32)
    integers, scales = quantized(weight, bits, axes=(1,))
    np.testing.assert_allclose(scales, [[1 / last], [1.0]], rtol=1e-6)
    np.testing.assert_array_equal(integers, [[last, {8: -62, 4: -3}[bits], {8: 25, 4: 1}[bits]], [0, 0, 0]])


def test_onnxruntime_multiplies_with_the_weights_as_they_are_stored(wide: Graph, tmp_path: Path) -> None:
    import onnxruntime

    WeightOnlyQuantization(bits=4, group_size=32)(wide, {}, "onnxruntime", tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("MatMulNBits") == 2
    assert not {"Gemm", "FusedGemm", "MatMul"}.intersection(operators)


@ENGINES
def test_takes_embeddings_and_any_length(reader: Graph, many_texts: Columns, tmp_path: Path, engine: Engine) -> None:
    WeightOnlyQuantization()(reader, {}, engine.family, tmp_path)
    stored = {each.name: each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["embedding.weight_rows_integers"] == onnx.TensorProto.INT8
    assert "embedding.weight" not in stored
    rows = {name: values[:, :3] for name, values in many_texts.items()}
    with torch.no_grad():
        expected = rebuild(reader.module)(**{name: torch.tensor(values) for name, values in rows.items()}).numpy()
    outputs = _outputs(engine, reader, tmp_path / "model.onnx", rows, tmp_path / "compiled")
    np.testing.assert_allclose(outputs, expected, atol=0.05 * np.ptp(expected))


def test_refuses_what_it_can_not_place(wide: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="for onnxruntime and openvino, not for eager"):
        WeightOnlyQuantization()(wide, {}, "eager", tmp_path)
    with pytest.raises(PassError, match=r"no constant weights in Gather \(quantization\.operators\)"):
        WeightOnlyQuantization(operators=("Gather",))(wide, {}, "onnxruntime", tmp_path)
    with pytest.raises(ConfigError, match=r"group_size must be a power of 2 or null, got 24 \(quantization.group_"):
        WeightOnlyQuantization(group_size=24)
    assert not list(tmp_path.iterdir())
