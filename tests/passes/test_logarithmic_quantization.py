"""Networks whose weights are powers of two and whose activations lie on a logarithmic scale."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Rows, Signature
from hasten.passes.quantization.logarithmic import LogarithmicQuantization


class Bench:
    """Rows of noise, and a few steps of AdamW on a copy."""

    seed = 0

    def __init__(self, steps: int = 0) -> None:
        self.train = Rows(inputs=rows(64), targets=np.arange(64) % 3)
        self.steps = steps
        self.fitted: list[nn.Module] = []

    def fit(self, model: nn.Module) -> nn.Module:
        student = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        for _ in range(self.steps):
            optimizer.zero_grad()
            outputs = student(torch.from_numpy(self.train.inputs["input"]))
            nn.functional.cross_entropy(outputs, torch.from_numpy(self.train.targets)).backward()
            optimizer.step()
        self.fitted.append(student.eval())
        return student


def rows(number: int, seed: int = 0) -> Columns:
    return {"input": np.random.default_rng(seed).standard_normal((number, 6), dtype=np.float32)}


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("mlp")
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=(6,)),), output_shape=(3,))
    module, arch = build({"_target_": "hasten.models.mlp.MLP", "hidden": [16]}, signature.inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module.eval(), folder / "module", signature, rows(16), folder)


def run(file: Path, inputs: Columns) -> np.ndarray:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, dict(inputs))[0]


def logarithmic(values: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    top, whole = 2**bits - 1, np.log(high - low + 1)
    integers = np.round(np.log(np.clip(values, low, high) - low + 1) / whole * top)
    return np.exp(integers / top * whole) - 1 + low


def test_network_equals_logarithmic_arithmetic_by_hand(graph: Graph, tmp_path: Path) -> None:
    calibration, given = rows(50), 3 * rows(20, seed=1)["input"]
    method = LogarithmicQuantization(
        weight_bits=3, activation_bits=5, activation_ranges="minmax", bias_correction=False, per_channel=False
    )
    method(graph, calibration, "onnxruntime", tmp_path, Bench())
    first, last = (layer for layer in rebuild(graph.module).modules() if isinstance(layer, nn.Linear))

    def layer(linear: nn.Linear, inputs: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
        weight, bias = (tensor.detach().double().numpy() for tensor in (linear.weight, linear.bias))
        if seen is not None:
            top = np.floor(np.log2(np.abs(weight).max() * 4 / 3))
            levels = np.array([0.0, *(sign * 2 ** (top - back) for back in range(3) for sign in (1, -1))])
            weight = levels[np.abs(weight[..., None] - levels).argmin(-1)]
            inputs = logarithmic(inputs, min(0, seen.min()), seen.max(), 5)
        return inputs @ weight.T + bias

    seen = calibration["input"].astype(np.float64)
    hidden_seen = np.maximum(layer(first, seen, None), 0)
    expected = layer(last, np.maximum(layer(first, given, seen), 0), hidden_seen)
    error = np.abs(run(tmp_path / "model.onnx", {"input": given}) - expected)
    assert np.median(error) < 1e-5
    assert error.max() < 0.05  # a value in the middle of two levels


def test_simulation_equals_the_trained_module_with_its_fake_quantizers(graph: Graph, tmp_path: Path) -> None:
    bench = Bench(steps=5)
    LogarithmicQuantization()(graph, rows(64), "onnxruntime", tmp_path, bench)
    for scale in (1, 10):
        given = {"input": scale * rows(100, seed=1)["input"]}
        with torch.no_grad():
            expected = bench.fitted[0](torch.tensor(given["input"])).numpy()
        error = np.abs(run(tmp_path / "model.onnx", given) - expected)
        assert np.median(error) < 1e-5 * np.ptp(expected)
        assert error.max() < 0.1 * np.ptp(expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_of_the_graph_are_powers_of_two_after_training(graph: Graph, tmp_path: Path, bits: int) -> None:
    method = LogarithmicQuantization(weight_bits=bits, activation_bits=None)
    method(graph, rows(64), "onnxruntime", tmp_path, Bench(steps=5))
    weights = [numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer]
    for weight in (weight for weight in weights if weight.ndim == 2):
        mantissas, _ = np.frexp(np.abs(weight))
        assert set(mantissas.ravel().tolist()) <= {0.0, 0.5}
        channels = weight if weight.shape in ((16, 6), (3, 16)) else weight.T
        for channel in channels:
            assert len(np.unique(np.abs(channel[channel != 0]))) <= 2 ** (bits - 1) - 1


def test_says_on_which_hardware_it_pays(graph: Graph, tmp_path: Path) -> None:
    (note,) = LogarithmicQuantization()(graph, rows(8), "openvino", tmp_path, Bench())
    assert note.startswith(
        "powers of two of 4 bits as weights and logarithmic activations of 4 bits are simulated in 32-bit floats: they "
        "pay where a multiplication becomes a shift, on FPGAs and ASICs, and cost time on CPUs and GPUs; packed, the "
        "weights would take 72 bytes of the file's "
    )


def test_gives_the_same_bytes_again(graph: Graph, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        LogarithmicQuantization()(graph, rows(40), "onnxruntime", tmp_path / name, Bench(steps=1))
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]


def test_refuses_engines_that_read_the_module(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="which eager does not read: choose engine=onnxruntime or engine=openvino"):
        LogarithmicQuantization()(graph, rows(8), "eager", tmp_path, Bench())
