from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
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
from hasten.passes.quantization import openvino, static
from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.static import StaticQuantization

SHAPE = (3, 8, 8)
FAMILIES = pytest.mark.parametrize("family", ["onnxruntime", "openvino", "tensorrt"])


def _graph(folder: Path, arch: dict[str, object], shape: tuple[int, ...], classes: int) -> Graph:
    (folder / "module").mkdir()
    signature = _signature(shape, classes)
    module, arch = build(arch, signature.inputs, (classes,), seed=0)
    rows = _rows(16, shape)
    with torch.no_grad():
        module.train()(torch.tensor(rows["input"]))
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, rows, folder)


def _signature(shape: tuple[int, ...] = SHAPE, classes: int = 10) -> Signature:
    return Signature(inputs=(Input(shape=shape),), output_shape=(classes,))


def _rows(number: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Columns:
    return {"input": np.random.default_rng(seed).standard_normal((number, *shape), dtype=np.float32)}


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A residual CNN whose batch norms have seen data."""
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}
    return _graph(tmp_path_factory.mktemp("residual"), arch, SHAPE, 10)


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One linear layer, 6 -> 4."""
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 4}
    return _graph(tmp_path_factory.mktemp("linear"), arch, (6,), 4)


def _run(file: Path, rows: Columns, *, optimised: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(rows))[0]


def _integer_weights(file: Path) -> list[np.ndarray]:
    initializers = onnx.load(file).graph.initializer
    return [
        numpy_helper.to_array(each) for each in initializers if each.data_type == onnx.TensorProto.INT8 and each.dims
    ]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["s7", "s8"])
def test_unfused_graph_equals_the_quantized_pytorch_graph(graph: Graph, tmp_path: Path, weights: str) -> None:
    StaticQuantization(weights=weights)(graph, _rows(64), "openvino", tmp_path)
    program = openvino.quantized(rebuild(graph.module), _signature(), _rows(64), Placement(weights=weights))
    for scale in (1, 10):  # inside of the calibrated range, and far outside
        rows = scale * _rows(100, seed=1)["input"]
        with torch.no_grad():
            expected = program.module()(torch.tensor(rows)).numpy()
        outputs = _run(tmp_path / "model.onnx", {"input": rows}, optimised=False)
        error = np.abs(outputs - expected).max(axis=1) / np.ptp(expected)
        # PyTorch multiplies by 1/scale where ONNX divides: of 3000 values of a row, about one in 10000 lies so close to
        # the middle of two integers that it is rounded to the other one, and that step travels on.
        assert np.median(error) < 1e-6
        assert np.mean(error > 1e-5) < 0.4
        assert error.max() < 0.02


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weights", ["s7", "s8", "u8"])
def test_linear_layer_equals_affine_arithmetic_by_hand(
    linear: Graph, tmp_path: Path, per_channel: bool, weights: str
) -> None:
    calibration, rows = _rows(50, (6,))["input"], 2 * _rows(20, (6,), seed=1)["input"]
    method = StaticQuantization(calibration_rows=50, per_channel=per_channel, weights=weights)
    method(linear, {"input": calibration}, "onnxruntime", tmp_path)
    module = rebuild(linear.module)
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.weight, module.bias))

    def affine(values: np.ndarray) -> tuple[float, float]:
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        return (high - low) / 255, np.round(-low * 255 / (high - low))

    x_scale, x_zero = affine(calibration)
    y_scale, y_zero = affine(calibration @ weight.T + bias)
    top = {"s7": 64, "s8": 127, "u8": 127.5}[weights]
    w_scale = np.abs(weight).max(axis=1 if per_channel else None, keepdims=True) / top
    x_integers = np.clip(np.round(rows / x_scale) + x_zero, 0, 255) - x_zero
    w_integers = np.clip(np.round(weight / w_scale), -128, 127)
    b_integers = np.round(bias / (x_scale * w_scale).squeeze())
    sums = x_integers @ w_integers.T + b_integers
    y_integers = np.clip(np.round(sums * (x_scale * w_scale / y_scale).reshape(-1)) + y_zero, 0, 255)
    expected = (y_integers - y_zero) * y_scale
    for optimised in (True, False):
        outputs = _run(tmp_path / "model.onnx", {"input": rows}, optimised=optimised)
        steps = np.abs(outputs - expected) / y_scale
        assert steps.max() < 1.01
        assert np.mean(steps < 0.01) > 0.95  # all but ties


class _Engine:
    """Places a file that says which weights it has, and is off by a given error for each of them."""

    WITHOUT_VNNI = ("s7", "s8", "u8")

    def __init__(self, errors: dict[str, float]) -> None:
        self._errors = errors

    def place(self, graph: Graph, rows: Columns, placement: Placement, file: Path) -> None:
        file.write_text(placement.weights)

    def outputs(self, file: Path, rows: Columns) -> np.ndarray:
        error = 0.0 if file.suffix == ".onnx" and file.stat().st_size > 2 else self._errors[file.read_text()]
        return np.array([[-1.0], [1.0]]) + error


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ((0.3, 0.4, 0.2), "s7"),  # slower ones have to halve the error
        ((0.3, 0.2, 0.11), "s8"),
        ((0.3, 0.4, 0.1), "u8"),
    ],
)
def test_without_vnni_the_nearest_outputs_decide_on_the_weights(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: tuple[float, ...], chosen: str
) -> None:
    engine = _Engine(dict(zip(("s7", "s8", "u8"), errors, strict=True)))
    monkeypatch.setattr(static, "has_vnni", lambda: False)
    monkeypatch.setattr(static, "placer", lambda family: engine)
    (note,) = StaticQuantization()(linear, _rows(8, (6,)), "any", tmp_path)
    assert (tmp_path / "model.onnx").read_text() == chosen
    figures = ", ".join(f"{name} {error:.2%}" for name, error in zip(("s7", "s8", "u8"), errors, strict=True))
    assert note == f"weights={chosen}, whose outputs on 2 calibration rows are nearest: {figures}"


@FAMILIES
def test_with_vnni_weights_have_all_their_bits(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(static, "has_vnni", lambda: True)
    assert StaticQuantization()(linear, _rows(50, (6,)), family, tmp_path) == ()
    (weight,) = (weight for weight in _integer_weights(tmp_path / "model.onnx") if weight.ndim == 2)
    assert np.abs(weight.astype(int)).max() >= 127


@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_takes_what_it_finds_nearest_in_the_engine_itself(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """No kernel saturates on one layer of six small inputs: eight bits are nearer than seven."""
    monkeypatch.setattr(static, "has_vnni", lambda: False)
    (note,) = StaticQuantization()(linear, _rows(50, (6,)), family, tmp_path)
    assert note.startswith("weights=s8, whose outputs on 50 calibration rows are nearest: s7 ")


def test_unsigned_weights_are_for_onnxruntime(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"choose s8 or s7 \(quantization\.weights\)"):
        StaticQuantization(weights="u8")(linear, _rows(8, (6,)), "openvino", tmp_path)
    assert not list(tmp_path.iterdir())


@FAMILIES
@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_weights_per_channel_or_per_tensor(
    linear: Graph, tmp_path: Path, family: str, per_channel: bool
) -> None:
    StaticQuantization(per_channel=per_channel)(linear, _rows(50, (6,)), family, tmp_path)
    (weight,) = (weight for weight in _integer_weights(tmp_path / "model.onnx") if weight.ndim == 2)
    channels = weight if weight.shape == (4, 6) else weight.T
    full = np.abs(channels.astype(int)).max(axis=1) >= 127
    assert full.all() if per_channel else not full.all()


@pytest.mark.slow
@FAMILIES
def test_takes_several_integer_inputs_of_any_length(
    reader: Graph, many_texts: Columns, tmp_path: Path, family: str
) -> None:
    StaticQuantization()(reader, many_texts, family, tmp_path)
    assert len([weight for weight in _integer_weights(tmp_path / "model.onnx") if weight.ndim == 2]) >= 7
    module = rebuild(reader.module)
    for length in (8, 3):
        rows = {name: values[:, :length] for name, values in many_texts.items()}
        with torch.no_grad():
            expected = module(**{name: torch.tensor(values) for name, values in rows.items()}).numpy()
        outputs = _run(tmp_path / "model.onnx", rows, optimised=False)
        np.testing.assert_allclose(outputs, expected, atol=0.1 * np.ptp(expected))


@pytest.mark.slow
def test_keeps_a_channel_of_small_weights(linear: Graph, tmp_path: Path) -> None:
    module = rebuild(linear.module)
    with torch.no_grad():
        module.weight[0] *= 1e-4
        module.bias.zero_()
    rows = _rows(64, (6,))
    program = openvino.quantized(module, _signature((6,), 4), rows, Placement())
    quantized = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.int8]
    assert len(quantized) == 1
    assert quantized[0][0].int().abs().max() >= 127


@pytest.mark.slow
@FAMILIES
def test_gives_the_same_bytes_again_and_touches_nothing_else(graph: Graph, tmp_path: Path, family: str) -> None:
    root = graph.onnx.parent
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in root.rglob("*") if file.is_file()}
    rows = _rows(40)
    kept = rows["input"].copy()
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        StaticQuantization()(graph, rows, family, tmp_path / name)
        assert [file.name for file in (tmp_path / name).iterdir()] == ["model.onnx"]
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in root.rglob("*") if file.is_file()} == before
    np.testing.assert_array_equal(rows["input"], kept)


_QUANTIZE = """
import sys, numpy as np
from pathlib import Path
from hasten.artefacts.capture import read_graph
from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.static import StaticQuantization
folder, out, family = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rows = {"input": np.random.default_rng(0).standard_normal((40, 6), dtype=np.float32)}
StaticQuantization()(read_graph(folder, folder / "module"), rows, family, out)
"""


@pytest.mark.slow
@FAMILIES
def test_gives_the_same_bytes_in_another_process_without_a_word(linear: Graph, tmp_path: Path, family: str) -> None:
    (tmp_path / "other").mkdir()
    StaticQuantization()(linear, _rows(40, (6,)), family, tmp_path)
    command = [sys.executable, "-c", _QUANTIZE, str(linear.onnx.parent), str(tmp_path / "other"), family]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert (tmp_path / "other" / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_measures_ranges_on_rows_spread_over_all(linear: Graph, tmp_path: Path) -> None:
    """Rows sorted by size: the first ones alone would give a tenth of the range."""
    rows = np.repeat(np.linspace(0.1, 10, 100, dtype=np.float32)[:, None], 6, axis=1)
    StaticQuantization(calibration_rows=5)(linear, {"input": rows}, "onnxruntime", tmp_path)
    scales = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert scales["input_scale"] == pytest.approx(10 / 255, rel=1e-6)


def test_makes_do_with_fewer_rows_than_asked_for(linear: Graph, tmp_path: Path) -> None:
    StaticQuantization(calibration_rows=256)(linear, _rows(3, (6,)), "onnxruntime", tmp_path)
    assert (tmp_path / "model.onnx").exists()


def test_needs_rows(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="quantization=static needs training rows to measure ranges on, got 0"):
        StaticQuantization()(linear, _rows(0, (6,)), "onnxruntime", tmp_path)


def test_says_where_it_can_be_placed(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="onnxruntime, openvino and tensorrt, not for eager: choose engine="):
        StaticQuantization()(linear, _rows(8, (6,)), "eager", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_leaves_logging_as_it_was(reader: Graph, many_texts: Columns, tmp_path: Path) -> None:
    """The tool warns of the transformer's normalization."""
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters), root.level
    StaticQuantization()(reader, many_texts, "onnxruntime", tmp_path)
    assert (list(root.handlers), list(root.filters), root.level) == before


def test_declares_what_it_relieves() -> None:
    assert StaticQuantization.relieves == ("compute", "memory", "capacity")
