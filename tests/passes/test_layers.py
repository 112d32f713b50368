from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hasten.artefacts.capture import capture, write_graph
from hasten.artefacts.module import build, forward, rebuild, save
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.passes.quantization.bias_correction import correct_biases
from hasten.passes.quantization.equalization import equalize
from hasten.passes.quantization.layers import kept, kept_nodes, layers
from hasten.passes.quantization.placement import Placement, relative_error
from hasten.passes.quantization.ranges import Histogram, Method
from hasten.passes.quantization.static import StaticQuantization, placer

FAMILIES = pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
SIGNATURE = Signature(inputs=(Input(shape=(3, 6, 6)),), output_shape=(4,))


class Chain(nn.Module):
    """Convolution with batch normalization, depthwise convolution, pooling, linear layer; channels of unlike size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
        with torch.no_grad():
            unlike = torch.logspace(-2, 1, 8)
            self.stem[1].weight.copy_(unlike)
            self.depthwise.weight.mul_(torch.logspace(1, -2, 8).view(8, 1, 1, 1))
            self.stem[1].bias.copy_(0.1 * unlike)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.depthwise(self.stem(images)))).flatten(1))


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "module").mkdir()
    module, arch = build({"_target_": f"{__name__}.Chain"}, SIGNATURE.inputs, (4,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", SIGNATURE, rows(16), folder)


def rows(number: int) -> Columns:
    """Of which some values lie far outside."""
    values = np.random.default_rng(0).standard_normal((number, 3, 6, 6), dtype=np.float32)
    values[0, 0, 0, 0] = 40.0
    return {"input": values}


def _outputs(module: nn.Module, given: Columns) -> np.ndarray:
    with torch.no_grad():
        return forward(module, {name: torch.tensor(values) for name, values in given.items()}).numpy()


def _error(graph: Graph, family: str, folder: Path, **knobs: object) -> float:
    folder.mkdir()
    StaticQuantization(weights="s8", **knobs)(graph, rows(64), family, folder)  # type: ignore[arg-type]
    return relative_error(
        placer(family).outputs(folder / "model.onnx", rows(64)), _outputs(rebuild(graph.module), rows(64))
    )


def test_layers_have_the_paths_of_their_modules(chain: Graph) -> None:
    found = layers(capture(rebuild(chain.module), SIGNATURE).module())
    assert [(each.path, each.weight) for each in found] == [
        ("stem.0", "stem.0.weight"),
        ("depthwise", "depthwise.weight"),
        ("head", "head.weight"),
    ]


def test_a_transformer_s_layers_are_found_in_both_graphs(reader: Graph) -> None:
    model, module = onnx.load(reader.onnx), rebuild(reader.module)
    captured = capture(module, reader.signature).module()
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    for layer in layers(captured):
        (name,) = kept_nodes((layer.path,), captured, model)
        weight = module.get_parameter(layer.weight).detach().numpy()
        read = [stored[each] for each in nodes[name].input if each in stored]
        assert any(np.array_equal(each, weight) or np.array_equal(each, weight.T) for each in read), layer.path


def test_a_name_stands_for_a_layer_or_for_all_below_it() -> None:
    paths = ["stem", "blocks.0.up", "blocks.0.down", "blocks.1", "head"]
    assert kept(("first", "last"), paths) == {"stem", "head"}
    assert kept(("blocks.0",), paths) == {"blocks.0.up", "blocks.0.down"}
    assert kept(("blocks.1",), paths) == {"blocks.1"}
    with pytest.raises(PassError, match=r"got 'haed', did you mean 'head'\? \(quantization.keep\)"):
        kept(("haed",), paths)


@FAMILIES
def test_kept_layers_read_their_weights_in_floats(chain: Graph, tmp_path: Path, family: str) -> None:
    StaticQuantization(keep=("stem", "last"))(chain, rows(16), family, tmp_path)
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    axes = {
        each.data_type: sorted(len(each.dims) for each in stored if each.data_type == kind and len(each.dims) > 1)
        for kind in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT)
        for each in stored
        if each.data_type == kind
    }
    assert axes[onnx.TensorProto.INT8] == [4]
    assert axes[onnx.TensorProto.FLOAT] == [2, 4]


@FAMILIES
@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy"])
def test_activations_have_the_declared_range(chain: Graph, tmp_path: Path, family: str, ranges: Method) -> None:
    given, percentile = rows(64), 99.0
    StaticQuantization(ranges=ranges, percentile=percentile)(chain, given, family, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (scale,) = (
        stored[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear" and "input" in node.input
    )
    histogram = Histogram()
    histogram.observe(given["input"])
    low, high = histogram.range(ranges, percentile=percentile)
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert high <= 40.0
    assert (ranges in ("percentile", "entropy")) == (high < 5.0), "one outlier in seven thousand values"


def test_equalized_layers_give_the_same_outputs_and_share_their_range(chain: Graph) -> None:
    module = rebuild(chain.module)
    captured = capture(module, SIGNATURE).module()
    assert equalize(captured) == 2
    np.testing.assert_allclose(_outputs(captured, rows(16)), _outputs(module, rows(16)), rtol=1e-3, atol=1e-4)
    normalization, depthwise = module.stem[1], captured.get_parameter("depthwise.weight").detach()
    factor = captured.get_parameter("stem.1.weight").detach() / (normalization.running_var + normalization.eps).sqrt()
    largest = (captured.get_parameter("stem.0.weight").detach() * factor.view(-1, 1, 1, 1)).abs().flatten(1).amax(1)
    largest = torch.maximum(largest, captured.get_parameter("stem.1.bias").detach().abs())
    torch.testing.assert_close(largest, depthwise.abs().flatten(1).amax(1), rtol=1e-2, atol=1e-6)


@pytest.mark.slow
@FAMILIES
def test_equalization_saves_channels_of_unlike_size(chain: Graph, tmp_path: Path, family: str) -> None:
    plain, equal = (
        _error(chain, family, tmp_path / str(equalized), per_channel=False, equalize=equalized)
        for equalized in (False, True)
    )
    assert equal < 0.7 * plain


def test_corrected_biases_take_away_the_mean_error() -> None:
    """One weight far larger than the others costs these their last bits, which inputs of one sign add up."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        module[0].weight[:, 0] = 20.0
    signature = Signature(inputs=(Input(shape=(32,)),), output_shape=(4,))
    given = {"input": np.random.default_rng(0).random((256, 32), dtype=np.float32) + 1}
    captured = capture(module, signature).module()
    before = captured.get_parameter("0.bias").detach().clone()
    assert correct_biases(captured, given, Placement(per_channel=False)) == (2, 0)
    step = 20 / 127
    weight = module[0].weight.detach().double()
    error = (weight / step).round() * step - weight
    shift = torch.tensor(given["input"]).double().mean(0) @ error.T
    torch.testing.assert_close(
        (before - captured.get_parameter("0.bias").detach()).double(), shift, rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@FAMILIES
def test_bias_correction_saves_a_coarse_layer(tmp_path: Path, family: str) -> None:
    (tmp_path / "module").mkdir()
    signature = Signature(inputs=(Input(shape=(32,)),), output_shape=(8,))
    arch = {"_target_": "torch.nn.Linear", "in_features": 32, "out_features": 8}
    module, arch = build(arch, signature.inputs, (8,), seed=0)
    with torch.no_grad():
        module.weight[0, 0] = 20.0
    save(tmp_path / "module", arch, module)
    given = {"input": 1 + 0.1 * np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)}
    graph = write_graph(module, tmp_path / "module", signature, given, tmp_path)
    shifts = []
    for corrected in (False, True):
        (folder := tmp_path / str(corrected)).mkdir()
        method = StaticQuantization(weights="s8", per_channel=False, bias_correction=corrected)
        method(graph, given, family, folder)
        outputs = placer(family).outputs(folder / "model.onnx", given)
        shifts.append(np.abs((outputs - _outputs(module.eval(), given)).mean(0)).mean())
    assert shifts[1] < 0.3 * shifts[0]
