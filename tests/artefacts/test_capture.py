from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hasten.artefacts.capture import GraphCost, capture, count, read_cost, read_graph, to_onnx, write_graph
from hasten.artefacts.operators import kind
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature


def signature_of(*shape: int, outputs: int = 2) -> Signature:
    return Signature(inputs=(Input(shape=shape),), output_shape=(outputs,))


SHAPE = (3, 6, 6)
SIGNATURE = signature_of(*SHAPE)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        return self.head(self.drop(torch.relu(self.body(y) + y).mean((2, 3))))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    module = Residual()
    with torch.no_grad():
        module(torch.randn(16, *SHAPE))  # moves the running statistics off their defaults
    return module


def _run(file: Path, **rows: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, rows)[0]


def test_the_graph_computes_the_module_at_any_batch_size(module: nn.Module, tmp_path: Path) -> None:
    to_onnx(capture(module, SIGNATURE), SIGNATURE, tmp_path / "model.onnx")
    for batch in (1, 2, 7):
        rows = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            expected = module.eval()(rows).numpy()
        np.testing.assert_allclose(_run(tmp_path / "model.onnx", input=rows.numpy()), expected, rtol=1e-5, atol=1e-6)


def test_zeros_have_one_sign_where_a_normalization_of_negative_scale_is_folded_in(
    module: nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad():
        module.norm.weight.copy_(torch.tensor([-1.0, 1.0, -2.0, 2.0]))
        module.stem.weight[:, 0] = 0
    to_onnx(capture(module, SIGNATURE), SIGNATURE, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) == 4]
    zeros = np.concatenate([weight[weight == 0] for weight in weights])
    assert len(zeros) == module.stem.weight[:, 0].numel()
    assert not np.signbit(zeros).any()


def test_leaves_the_module_alone(module: nn.Module) -> None:
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    capture(module, SIGNATURE)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


_EXPORT = """
import sys, torch
from pathlib import Path
from hasten.artefacts.capture import capture, to_onnx
from hasten.core.interfaces import Input, Signature
module = torch.load("module.pt", weights_only=False)
signature = Signature(inputs=(Input(shape=(1, 4, 4)),), output_shape=(3,))
for copy in range(2):
    to_onnx(capture(module, signature), signature, Path(f"{copy}.onnx"))
"""


@pytest.mark.slow
def test_the_same_module_gives_the_same_bytes_in_every_process_without_a_word(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    torch.save(module, tmp_path / "module.pt")
    signature = signature_of(1, 4, 4, outputs=3)
    to_onnx(capture(module, signature), signature, tmp_path / "mine.onnx")
    command = [sys.executable, "-c", _EXPORT]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert len({(tmp_path / name).read_bytes() for name in ("mine.onnx", "0.onnx", "1.onnx")}) == 1


def test_the_file_names_no_path_and_holds_no_metadata(module: nn.Module, tmp_path: Path) -> None:
    to_onnx(capture(module, SIGNATURE), SIGNATURE, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content
    assert os.getcwd().encode() not in content
    model = onnx.load(tmp_path / "model.onnx")
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_that_cannot_be_captured_is_refused_with_its_reason() -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(PassError, match=r"can't be captured by torch\.export with input \('batch', 3\): \S"):
        capture(Moody(), signature_of(3))


def test_counts_the_work_of_one_row_as_by_hand(module: nn.Module) -> None:
    pixels, floats = 36, 4
    cost = count(capture(module, SIGNATURE))
    assert cost.flops == {
        "convolution": 2 * pixels * 4 * 9 * (3 + 4),
        "normalization": 2 * pixels * 4,
        "elementwise": 3 * pixels * 4,  # two ReLUs and the addition
        "pooling": pixels * 4,
        "linear": 2 * 4 * 2,
    }
    assert cost.num_bytes == {
        "convolution": floats * (pixels * (3 + 4) + 4 * 27 + pixels * (4 + 4) + 4 * 36 + 4),
        "normalization": floats * (2 * pixels * 4 + 4 * 4),
        "elementwise": floats * (2 + 3 + 2) * pixels * 4,
        "pooling": floats * (pixels * 4 + 4),
        "linear": floats * (4 + 2 + 4 * 2 + 2),
    }
    assert cost.calls == {"convolution": 2, "normalization": 1, "elementwise": 3, "pooling": 1, "linear": 1}
    assert cost.num_parameters == 4 * 27 + 2 * 4 + (4 * 36 + 4) + (4 * 2 + 2)
    assert cost.weight_bytes == floats * (cost.num_parameters + 2 * 4)  # with the running mean and variance


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.ConvTranspose2d(8, 2, 3, groups=2)),
            (4, 9, 9),
        ),
        (lambda: nn.Conv1d(3, 5, 3, dilation=2), (3, 20)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)), (3, 4)),
        (Attention, (5, 8)),
    ],
)
def test_multiply_adds_agree_with_pytorchs_own_counter(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module = build()
    cost = count(capture(module, signature_of(*shape)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *shape))
    assert cost.flops.get("convolution", 0) + cost.flops.get("linear", 0) == counter.get_total_flops()


def test_tied_weights_count_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    cost = count(capture(module, signature_of(4)))
    assert (cost.num_parameters, cost.weight_bytes) == (16, 64)


def test_writes_a_graph_that_reads_back(module: nn.Module, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    graph = write_graph(module, tmp_path / "module", SIGNATURE, {"input": rows}, tmp_path)
    assert graph == read_graph(tmp_path, tmp_path / "module")
    assert (graph.signature, graph.quantized, graph.module) == (SIGNATURE, False, tmp_path / "module")
    reference = load_file(graph.reference)
    np.testing.assert_array_equal(reference["inputs.input"], rows)
    with torch.no_grad():
        np.testing.assert_allclose(reference["outputs"], module.eval()(torch.tensor(rows)), rtol=1e-6, atol=1e-7)
    assert read_cost(tmp_path) == count(capture(module, SIGNATURE))
    assert isinstance(read_cost(tmp_path), GraphCost)


def given_by(module: nn.Module, rows: Columns) -> np.ndarray:
    with torch.no_grad():
        return module(**{name: torch.from_numpy(values) for name, values in rows.items()}).numpy()


def cut(rows: Columns, number: int, length: int) -> Columns:
    """The first rows, and the first tokens of each."""
    return {name: values[:number, :length] if name != "size" else values[:number] for name, values in rows.items()}


Read = tuple[nn.Module, Graph, Columns]


@pytest.mark.parametrize(("number", "length"), [(1, 6), (3, 1), (5, 4)])
def test_several_inputs_keep_their_names_and_their_lengths_stay_open(reader: Read, number: int, length: int) -> None:
    module, graph, rows = reader
    shorter = cut(rows, number, length)
    np.testing.assert_allclose(_run(graph.onnx, **shorter), given_by(module, shorter), rtol=1e-5, atol=1e-6)


def test_inputs_stand_in_the_order_of_the_signature(reader: Read) -> None:
    _, graph, _ = reader
    given = onnx.load(graph.onnx).graph.input
    assert [value.name for value in given] == ["ids", "mask", "size"]
    shapes = [[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in given]
    assert shapes[0][0] == shapes[1][0] == shapes[2][0] == "batch"
    assert isinstance(shapes[0][1], str)
    assert shapes[0] == shapes[1], "both lengths are one"
    assert shapes[2][1:] == [2]


def test_the_reference_holds_every_input_by_its_name(reader: Read) -> None:
    module, graph, rows = reader
    assert read_graph(graph.onnx.parent, graph.module) == graph
    reference = load_file(graph.reference)
    assert reference.keys() == {"inputs.ids", "inputs.mask", "inputs.size", "outputs"}
    for name, values in rows.items():
        np.testing.assert_array_equal(reference[f"inputs.{name}"], values)
    np.testing.assert_allclose(reference["outputs"], given_by(module, rows), rtol=1e-6, atol=1e-7)


def test_a_row_of_open_length_costs_what_the_longest_costs(reader: Read) -> None:
    module, graph, _ = reader
    longest = tuple(replace(each, dynamic=()) for each in graph.signature.inputs)
    cost = read_cost(graph.onnx.parent)
    assert cost == count(capture(module, replace(graph.signature, inputs=longest)))
    assert cost.flops["linear"] == 2 * 6 * 3


def test_an_input_that_the_model_does_not_know_is_told(reader: Read) -> None:
    module, graph, _ = reader
    strange = replace(graph.signature, inputs=(*graph.signature.inputs[:2], Input(name="width", shape=(2,))))
    with pytest.raises(PassError, match=r"with ids \('batch', 6\), mask \('batch', 6\), width \('batch', 2\): \S"):
        capture(module, strange)


def test_a_model_that_wants_one_length_is_refused_an_open_one() -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    inputs = (Input(name="pressure", shape=(2, 6), dynamic=(1,)),)
    with pytest.raises(PassError, match=r"with pressure \('batch', 2, 6\): "):
        capture(fixed, Signature(inputs=inputs, output_shape=(3,)))


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::conv2d", "convolution"),
        ("aten.linear.default", "linear"),
        ("aten::relu_", "elementwise"),
        ("QLinearConv", "convolution"),
        ("com.microsoft::QLinearAdd", "elementwise"),
        ("QLinearGlobalAveragePool", "pooling"),
        ("QGemm", "linear"),
        ("MatMulInteger", "linear"),
        ("MatMulIntegerToFloat", "linear"),
        ("ConvInteger", "convolution"),
        ("FusedConv", "convolution"),
        ("NhwcFusedConv", "convolution"),
        ("FusedGemm", "linear"),
        ("DequantizeLinear", "quantize"),
        ("FullyConnected", "linear"),
        ("Reorder", "copy"),
        ("aten::native_layer_norm", "normalization"),
        ("aten::native_batch_norm", "normalization"),
        ("aten.convolution_backward.default", "convolution"),
        ("aten::threshold_backward", "elementwise"),
        ("aten._log_softmax_backward_data.default", "normalization"),
        ("aten::max_pool2d_with_indices_backward", "pooling"),
        ("SomethingElse", "other"),
    ],
)
def test_knows_the_kind_of_an_operator_in_every_vocabulary(operator: str, expected: str) -> None:
    assert kind(operator) == expected
