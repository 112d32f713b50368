"""Networks at any width: what they compute, in which engine, and what training through the rounding gives."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Rows, Signature
from hasten.passes.quantization import affine, widths
from hasten.passes.quantization.affine import AffineQuantization
from hasten.passes.quantization.fake import affine_quantizer

SHAPE = (3, 8, 8)


class Bench:
    """Rows of noise, and a few steps of AdamW on a copy, saved and loaded as an interrupted training does.

    Keeps what it gave, and copies of it with the moving averages of the training.
    """

    seed = 0

    def __init__(self, *shape: int, steps: int = 0) -> None:
        self.train = Rows(inputs=rows(64, *shape), targets=np.arange(64) % 3)
        self.steps = steps
        self.fitted: list[nn.Module] = []
        self.averaged: list[nn.Module] = []

    def fit(self, model: nn.Module) -> nn.Module:
        student = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        for _ in range(self.steps):
            optimizer.zero_grad()
            outputs = student(torch.from_numpy(self.train.inputs["input"]))
            nn.functional.cross_entropy(outputs, torch.from_numpy(self.train.targets)).backward()
            optimizer.step()
            student.load_state_dict(copy.deepcopy(student.state_dict()))
        self.fitted.append(student.eval())
        self.averaged.append(copy.deepcopy(student))
        return student


class Mixed(nn.Module):
    """Every kind of layer once; a recurrent one and an attention, which stay float; and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 4, 3, padding=1)
        self.image = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.up = nn.ConvTranspose1d(4, 6, 2, stride=2)
        self.memory = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.spare = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.image(self.stem(x).unsqueeze(2)).squeeze(2))
        x = self.memory(self.up(x).transpose(1, 2))[0]
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def rows(number: int, *shape: int, seed: int = 0) -> Columns:
    return {"input": np.random.default_rng(seed).standard_normal((number, *shape), dtype=np.float32)}


def written(folder: Path, arch: dict[str, Any], shape: tuple[int, ...]) -> Graph:
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=shape),), output_shape=(3,))
    module, filled = build(arch, signature.inputs, (3,), seed=0)
    estimate_statistics(module, rows(64, *shape))
    save(folder / "module", filled, module)
    return write_graph(module, folder / "module", signature, rows(16, *shape), folder)


@pytest.fixture(scope="session")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8], "num_blocks": 1}
    return written(tmp_path_factory.mktemp("residual"), arch, SHAPE)


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 3}
    return written(tmp_path_factory.mktemp("linear"), arch, (6,))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return written(tmp_path_factory.mktemp("mixed"), {"_target_": f"{__name__}.Mixed"}, (3, 8))


def run(file: Path, inputs: Columns, engine: str = "onnxruntime") -> np.ndarray:
    if engine == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        return openvino.Core().compile_model(str(file), "CPU", settings)(list(inputs.values()))[0]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))[0]


def outputs(model: nn.Module, inputs: Columns) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(inputs["input"])).numpy()


def test_for_tensorrt_eight_bits_are_placed_with_a_sign(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"no zero points: train without them \(quantization.symmetric=true\)"):
        AffineQuantization()(linear, rows(64, 6), "tensorrt", tmp_path, Bench(6))
    AffineQuantization(symmetric=True)(linear, rows(64, 6), "tensorrt", tmp_path, Bench(6))
    constants = {
        each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    (weight,) = (values for values in constants.values() if values.dtype == np.int8 and values.ndim == 2)
    assert np.abs(weight.astype(int)).max() == 127, "whatever this processor has"
    expected = rebuild(linear.module)(torch.tensor(rows(64, 6)["input"])).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", rows(64, 6)), expected, atol=0.03 * np.ptp(expected))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (16, False)])
def test_linear_layer_equals_affine_arithmetic_by_hand(
    linear: Graph, tmp_path: Path, bits: int, symmetric: bool, engine: str
) -> None:
    calibration, given = rows(50, 6), {"input": 3 * rows(20, 6, seed=1)["input"]}
    method = AffineQuantization(
        weight_bits=bits,
        activation_bits=bits,
        symmetric=symmetric,
        weight_ranges="minmax",
        activation_ranges="minmax",
        bias_correction=False,
    )
    method(linear, calibration, engine, tmp_path, Bench(6))
    module = rebuild(linear.module)
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.weight, module.bias))
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(1, keepdims=True) / top
    seen = calibration["input"]
    if symmetric:
        step, first, last = np.abs(seen).max() / top, -top, top
    else:
        step = (seen.max() - seen.min()) / (2**bits - 1)
        first = np.round(seen.min() / step)
        last = first + 2**bits - 1
    integers = np.clip(np.round(given["input"] / step), first, last)
    expected = integers * step @ (np.round(weight / scale) * scale).T + bias
    np.testing.assert_allclose(run(tmp_path / "model.onnx", given, engine), expected, atol=2e-5 if bits < 16 else 1e-3)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_simulation_equals_the_trained_module_with_its_fake_quantizers(
    residual: Graph, tmp_path: Path, engine: str
) -> None:
    bench = Bench(*SHAPE, steps=3)
    AffineQuantization(weight_bits=4, activation_bits=4)(residual, rows(64, *SHAPE), engine, tmp_path, bench)
    (trained,) = bench.fitted
    for scale in (1, 10):  # inside of the calibrated range, and far outside
        given = {"input": scale * rows(100, *SHAPE, seed=1)["input"]}
        expected = outputs(trained, given)
        error = np.abs(run(tmp_path / "model.onnx", given, engine) - expected).max(1) / np.ptp(expected)
        # Sums in another order take a value that lies in the middle of two levels to the other one.
        assert np.median(error) < 1e-5
        assert error.max() < 0.1


@pytest.mark.parametrize("bits", [2, 5])
def test_weights_take_no_more_values_than_their_bits_allow(residual: Graph, tmp_path: Path, bits: int) -> None:
    method = AffineQuantization(weight_bits=bits, activation_bits=None, per_channel=False)
    method(residual, rows(8, *SHAPE), "onnxruntime", tmp_path, Bench(*SHAPE))
    weights = [numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer]
    (last,) = [weight for weight in weights if weight.ndim == 2]
    assert 2 < len(np.unique(last)) <= 2**bits
    assert not [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Round"]


def test_keeps_the_layers_that_are_named(residual: Graph, tmp_path: Path) -> None:
    method = AffineQuantization(weight_bits=4, activation_bits=4, keep=("first", "last", "blocks.0.convolution1"))
    notes = method(residual, rows(8, *SHAPE), "onnxruntime", tmp_path, Bench(*SHAPE))
    module = rebuild(residual.module)
    paths = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    rounds = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Round"]
    assert len(rounds) == len(paths) - 3
    assert "stem.0, blocks.0.convolution1, classifier stay in floats (quantization.keep)" in notes


def test_says_which_layers_are_meant(residual: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"'clasifier', did you mean 'classifier'\? \(quantization.keep\)"):
        AffineQuantization(keep=("clasifier",))(residual, rows(8, *SHAPE), "onnxruntime", tmp_path, Bench(*SHAPE))
    with pytest.raises(PassError, match="ResNet has no layer to quantize: of its 4 convolutions and linear layers"):
        AffineQuantization(keep=("first", "blocks", "last"))(
            residual, rows(8, *SHAPE), "onnxruntime", tmp_path, Bench(*SHAPE)
        )


def test_takes_every_kind_of_layer_and_says_what_stays_float(mixed: Graph, tmp_path: Path) -> None:
    method = AffineQuantization(weight_bits=6, activation_bits=6)
    bench = Bench(3, 8, steps=2)
    notes = method(mixed, rows(64, 3, 8), "onnxruntime", tmp_path, bench)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert len([node for node in graph.node if node.op_type == "Round"]) == 4
    given = rows(30, 3, 8, seed=1)
    np.testing.assert_allclose(run(tmp_path / "model.onnx", given), outputs(bench.fitted[0], given), atol=0.02)
    assert notes[1:] == (
        "memory (LSTM), attention (MultiheadAttention) stay in floats: only convolutions and linear layers get fake "
        "quantizers",
        "spare stay in floats: nothing calls them as layers",
    )


class Unusual(nn.Module):
    """A table that is a layer's weight, too, a weight that is computed, and a layer that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 6)
        self.shared = nn.Linear(6, 3, bias=False)
        self.shared.weight = self.table.weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.named = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.named(input=self.computed(x) + self.table((x[:, 0] > 0).long()))))


def test_leaves_weights_alone_that_are_no_layers_own(tmp_path: Path) -> None:
    graph = written(tmp_path, {"_target_": f"{__name__}.Unusual"}, (6,))
    bench = Bench(6, steps=2)
    method = AffineQuantization(weight_bits=3, activation_bits=3)
    (tmp_path / "simulated").mkdir()
    notes = method(graph, rows(64, 6), "onnxruntime", tmp_path / "simulated", bench)
    assert notes[1:] == ("computed, shared stay in floats: their weights are shared or computed",)
    given = rows(30, 6, seed=1)
    simulated = run(tmp_path / "simulated" / "model.onnx", given)
    np.testing.assert_allclose(simulated, outputs(bench.fitted[0], given), atol=1e-5)
    assert len(np.unique(bench.fitted[0].named.weight.detach().numpy()[0])) <= 7
    with pytest.raises(
        PassError, match=r"Unusual has no layer to quantize: .* named stay in floats .*; computed, shared"
    ):
        AffineQuantization(keep=("named",))(graph, rows(64, 6), "onnxruntime", tmp_path, Bench(6))


def test_says_what_integers_are_placed_without_training(mixed: Graph, tmp_path: Path) -> None:
    notes = AffineQuantization()(mixed, rows(64, 3, 8), "onnxruntime", tmp_path, Bench(3, 8))
    assert notes[0].startswith("memory (LSTM), attention (MultiheadAttention) are left to the engine's placement: ")


def test_says_that_it_is_a_simulation_and_what_the_weights_would_take(linear: Graph, tmp_path: Path) -> None:
    def note(**knobs: Any) -> str:
        return AffineQuantization(**knobs)(linear, rows(8, 6), "onnxruntime", tmp_path, Bench(6))[0]

    assert note(weight_bits=4, activation_bits=3) == (
        "weights at 4 bits and activations at 3 bits are simulated in 32-bit floats: no engine here runs these widths; "
        f"packed, the weights would take 9 bytes of the file's {(tmp_path / 'model.onnx').stat().st_size} bytes"
    )
    assert note(weight_bits=8, activation_bits=None).startswith("weights at 8 bits are simulated in 32-bit floats")


@pytest.mark.parametrize("family", ["eager", "inductor"])
def test_refuses_engines_that_read_the_module(linear: Graph, tmp_path: Path, family: str) -> None:
    with pytest.raises(PassError, match=f"which {family} does not read: choose engine=onnxruntime or engine=openvino"):
        AffineQuantization()(linear, rows(8, 6), family, tmp_path, Bench(6))
    assert not list(tmp_path.iterdir())


def test_needs_rows_of_finite_numbers(linear: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="quantization needs training rows to measure ranges on, got 0"):
        AffineQuantization()(linear, rows(0, 6), "onnxruntime", tmp_path, Bench(6))
    with pytest.raises(PassError, match=r"the inputs of layer model can't be quantized: .*got NaN or infinity"):
        AffineQuantization()(linear, {"input": np.full((4, 6), np.nan, np.float32)}, "onnxruntime", tmp_path, Bench(6))


def test_gives_the_same_bytes_again_and_touches_nothing_else(residual: Graph, tmp_path: Path) -> None:
    def digests() -> dict[Path, str]:
        files = (file for file in residual.onnx.parent.rglob("*") if file.is_file())
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before, calibration, contents = digests(), rows(40, *SHAPE), []
    kept = calibration["input"].copy()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        method = AffineQuantization(weight_bits=3, activation_bits=5, activation_ranges="entropy")
        method(residual, calibration, "onnxruntime", tmp_path / name, Bench(*SHAPE, steps=1))
        assert [file.name for file in (tmp_path / name).iterdir()] == ["model.onnx"]
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]
    assert digests() == before
    np.testing.assert_array_equal(calibration["input"], kept)


def test_trains_the_network_that_is_simulated_and_estimates_its_normalization(residual: Graph, tmp_path: Path) -> None:
    bench = Bench(*SHAPE, steps=3)
    AffineQuantization(weight_bits=4, activation_bits=4)(residual, rows(64, *SHAPE), "onnxruntime", tmp_path, bench)
    (trained,) = bench.fitted
    seen: list[torch.Tensor] = []
    normalization = trained.stem[1]
    normalization.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    outputs(trained, bench.train.inputs)
    torch.testing.assert_close(normalization.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    scales = {name: value for name, value in trained.named_parameters() if name.endswith("log_scale")}
    assert len(scales) == 8
    assert all(scale.abs().max() > 0 for scale in scales.values())


def test_what_is_deployed_is_as_good_as_the_training_was_on_its_rows(residual: Graph, tmp_path: Path) -> None:
    """Weights that still jump between levels leave moving averages behind, which would lose what was learned."""
    bench = Bench(*SHAPE, steps=20)
    AffineQuantization(weight_bits=4, activation_bits=4)(residual, rows(64, *SHAPE), "onnxruntime", tmp_path, bench)
    inputs, labels = bench.train.inputs, bench.train.targets
    deployed = _cross_entropy(run(tmp_path / "model.onnx", inputs), labels)
    training = copy.deepcopy(bench.fitted[0]).train()
    with torch.no_grad():
        trained = _cross_entropy(training(torch.from_numpy(inputs["input"])).numpy(), labels)
    lost = _cross_entropy(outputs(bench.averaged[0], inputs), labels) - trained
    assert lost > 0.1
    assert abs(deployed - trained) < 0.2 * lost


def test_fixed_ranges_stay_as_they_were_calibrated(residual: Graph, tmp_path: Path) -> None:
    bench = Bench(*SHAPE, steps=2)
    method = AffineQuantization(weight_bits=4, activation_bits=4, learned_ranges=False)
    method(residual, rows(64, *SHAPE), "onnxruntime", tmp_path, bench)
    assert not [name for name, _ in bench.fitted[0].named_parameters() if name.endswith("log_scale")]


def test_bias_correction_takes_the_mean_shift_of_every_layer_back(residual: Graph) -> None:
    """Into the bias of the last layer, and into the normalization that reads a convolution without one."""
    reference, calibration = rebuild(residual.module), rows(128, *SHAPE)
    quantized = copy.deepcopy(reference)
    paths = ["stem.0", "blocks.0.convolution1", "blocks.0.convolution2", "classifier"]
    for path in paths:
        weight = quantized.get_submodule(path).weight
        largest = float(weight.detach().abs().max())
        weight.data = affine_quantizer(-largest, largest, 3, symmetric=True)(weight.data)
    after = ["stem.1", "blocks.0.normalization1", "blocks.0.normalization2", "classifier"]

    def shifts(model: nn.Module) -> list[float]:
        means: list[list[torch.Tensor]] = []
        for each in (reference, model):
            found: list[torch.Tensor] = []
            hooks = [
                each.get_submodule(path).register_forward_hook(
                    lambda layer, arguments, output, found=found: found.append(output.movedim(1, 0).flatten(1).mean(1))
                )
                for path in after
            ]
            outputs(each, calibration)
            for hook in hooks:
                hook.remove()
            means.append(found)
        return [float((one - other).abs().max()) for one, other in zip(*means, strict=True)]

    assert max(shifts(quantized)) > 0.1
    widths.correct_means(quantized, reference, paths, calibration)
    assert max(shifts(quantized)) < 1e-4


@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_eight_bits_are_placed_as_integers_with_the_trained_weights(
    residual: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(affine, "has_vnni", lambda: True)
    bench = Bench(*SHAPE, steps=3)
    notes = AffineQuantization()(residual, rows(64, *SHAPE), family, tmp_path, bench)
    assert notes == ()
    graph = onnx.load(tmp_path / "model.onnx").graph
    placed = [numpy_helper.to_array(each) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8]
    convolutions = [weight.astype(int) for weight in placed if weight.ndim == 4]
    assert len(convolutions) == 3
    (trained,) = bench.fitted
    weight = trained.get_submodule("stem.0").weight.detach()
    integers = weight / weight.abs().amax((1, 2, 3), keepdim=True) * 127
    (stem,) = [each for each in convolutions if each.shape == tuple(weight.shape)]
    # A negative factor of the normalization turns a whole channel round.
    signs = np.sign((stem * integers.numpy()).sum((1, 2, 3), keepdims=True))
    assert np.abs(stem * signs - integers.numpy()).max() <= 1
    given = rows(50, *SHAPE, seed=1)
    expected = outputs(trained, given)
    assert np.abs(run(tmp_path / "model.onnx", given, family) - expected).mean() < 0.1 * np.ptp(expected)


def test_eight_bits_leave_the_layers_to_be_kept_in_floats(residual: Graph, tmp_path: Path) -> None:
    method = AffineQuantization(keep=("last",))
    assert method(residual, rows(64, *SHAPE), "onnxruntime", tmp_path, Bench(*SHAPE)) == (
        "classifier stay in floats (quantization.keep)",
    )
    initializers = onnx.load(tmp_path / "model.onnx").graph.initializer
    types = {len(each.dims): each.data_type for each in initializers if len(each.dims) > 1}
    assert types == {4: onnx.TensorProto.INT8, 2: onnx.TensorProto.FLOAT}


def test_without_vnni_the_weights_keep_to_seven_bits(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "has_vnni", lambda: False)
    bench = Bench(6)
    AffineQuantization(weight_ranges="minmax")(linear, rows(64, 6), "onnxruntime", tmp_path, bench)
    weight = bench.fitted[0].weight.detach().numpy()
    levels = weight / np.abs(weight).max(1, keepdims=True) * 64
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    graph = onnx.load(tmp_path / "model.onnx").graph
    (placed,) = [
        numpy_helper.to_array(each)
        for each in graph.initializer
        if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2
    ]
    np.testing.assert_array_equal(placed.T if placed.shape != weight.shape else placed, np.round(levels))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_placed_weights_stay_on_the_grid_that_they_were_trained_on(
    linear: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, vnni: bool
) -> None:
    monkeypatch.setattr(affine, "has_vnni", lambda: vnni)
    bench = Bench(6)
    AffineQuantization()(linear, rows(64, 6), family, tmp_path, bench)
    graph = onnx.load(tmp_path / "model.onnx").graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    (node,) = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and values.get(node.input[0], np.zeros(1)).ndim == 2
    ]
    integers, scales = values[node.input[0]], values[node.input[1]]
    axis = next(each.i for each in node.attribute if each.name == "axis") % 2
    placed = integers * np.expand_dims(scales, 1 - axis)
    weight = bench.fitted[0].weight.detach().numpy()
    np.testing.assert_allclose(placed.T if placed.shape != weight.shape else placed, weight, rtol=1e-5)


@pytest.mark.slow
def test_training_at_few_bits_beats_calibration_on_digits(tmp_path: Path) -> None:
    """With the trainer that the stages use; cross-entropy of rows that were not trained on, in ONNX Runtime."""
    from sklearn.datasets import load_digits

    from hasten.core.interfaces import Silent
    from hasten.core.sections import TrainingSettings
    from hasten.tasks.classification import Classification
    from hasten.training.fit import fit

    data = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    train, test = slice(0, 1200), slice(1200, None)

    class Digits:
        seed = 0

        def __init__(self, epochs: int) -> None:
            self.train = Rows(inputs={"input": images[train]}, targets=labels[train])
            self.epochs = epochs

        def fit(self, model: nn.Module) -> nn.Module:
            settings = TrainingSettings(epochs=self.epochs, batch_size=64, lr=0.003, weight_decay=0.0)
            return fit(
                model,
                self.train,
                settings,
                task=Classification(),
                seed=0,
                threads=1,
                folder=tmp_path / "resume",
                checkpoint_seconds=60,
                progress=Silent(),
                what="quantized model",
                key="quantization.training",
            ).model

    arch = {"_target_": "hasten.models.mlp.MLP", "hidden": [32, 32]}
    signature = Signature(inputs=(Input(shape=(64,)),), output_shape=(10,))
    module, filled = build(arch, signature.inputs, (10,), seed=0)
    module = Digits(epochs=15).fit(module)
    for name in ("module", "ptq", "qat"):
        (tmp_path / name).mkdir()
    save(tmp_path / "module", filled, module)
    graph = write_graph(module, tmp_path / "module", signature, {"input": images[:8]}, tmp_path)
    losses = {"float": _cross_entropy(run(graph.onnx, {"input": images[test]}), labels[test])}
    for name, epochs in (("ptq", 0), ("qat", 10)):
        method = AffineQuantization(weight_bits=3, activation_bits=3)
        method(graph, {"input": images[:256]}, "onnxruntime", tmp_path / name, Digits(epochs))
        given = run(tmp_path / name / "model.onnx", {"input": images[test]})
        losses[name] = _cross_entropy(given, labels[test])
    assert losses["qat"] - losses["float"] < 0.5 * (losses["ptq"] - losses["float"])


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)))
