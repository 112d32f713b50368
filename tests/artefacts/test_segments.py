"""A graph that was divided is the graph, whatever it is made of and wherever it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, save
from hasten.artefacts.segments import Divided, decompose
from hasten.core.interfaces import Graph, Input, Signature
from hasten.passes.quantization.static import StaticQuantization

IMAGE = (Input(shape=(3, 16, 16)),)
WORDS = tuple(Input(name=name, shape=(12,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
STEPS = (Input(shape=(3, 12)),)


class Branches(nn.Module):
    """Two branches of a convolution each between a first one and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(3 if not it else 8, 8, 3, padding=1) for it in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.first(images))
        joined = torch.relu(self.left(hidden)) + torch.tanh(self.right(hidden))
        return self.last(joined.mean((2, 3)))


MODELS: Mapping[str, tuple[dict[str, Any], tuple[Input, ...]]] = {
    "residual": ({"_target_": "hasten.models.cifar_resnet.CifarResNet", "num_blocks": 2}, IMAGE),
    "depthwise": ({"_target_": "hasten.models.depthwise.DepthwiseCNN", "widths": [8, 16, 16]}, IMAGE),
    "transformer": ({"_target_": "hasten.models.transformer.Transformer", "num_layers": 2}, WORDS),
    "recurrent": ({"_target_": "hasten.models.recurrent.Recurrent"}, STEPS),
    "branches": ({"_target_": f"{__name__}.Branches"}, IMAGE),
}


def rows(inputs: tuple[Input, ...], count: int, length: int | None = None) -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(0)
    values: dict[str, NDArray[Any]] = {}
    for each in inputs:
        shape = (count, *(length or size if axis in each.dynamic else size for axis, size in enumerate(each.shape)))
        values[each.name] = (
            draw.integers(1, 9, shape) if each.dtype == "int64" else draw.standard_normal(shape, dtype=np.float32)
        )
    return values


def exported(name: str, folder: Path) -> Graph:
    arch, inputs = MODELS[name]
    module, arch = build(arch, inputs, (4,), seed=0, facts={"vocabulary_size": 9})
    (folder / "module").mkdir(parents=True)
    save(folder / "module", arch, module)
    signature = Signature(inputs=inputs, output_shape=(4,))
    return write_graph(module, folder / "module", signature, rows(inputs, 4), folder)


def run(file: Path, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options)
    outputs: NDArray[Any] = session.run(None, {each.name: values[each.name] for each in session.get_inputs()})[0]
    return outputs


def together(divided: Divided, graphs: list[Graph], values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What the segments give, one after the other."""
    known = dict(values)
    for segment, graph in zip(divided.segments, graphs, strict=True):
        known[segment.writes] = run(graph.onnx, known)
    return known[divided.segments[-1].writes]


@pytest.mark.parametrize("name", MODELS)
def test_segments_give_what_the_graph_gives_bit_for_bit(name: str, tmp_path: Path) -> None:
    graph = exported(name, tmp_path / "graph")
    divided = decompose(graph, 6)
    graphs = divided.write(tmp_path / "segments")
    assert 1 < len(graphs) <= 6
    assert sum(segment.share for segment in divided.segments) == pytest.approx(1)
    for count, length in ((1, None), (5, None), (2, 7)):
        values = rows(graph.signature.inputs, count, length)
        np.testing.assert_array_equal(together(divided, graphs, values), run(graph.onnx, values))


@pytest.mark.parametrize("name", ["residual", "branches"])
def test_each_segment_is_a_graph_with_its_own_reference(name: str, tmp_path: Path) -> None:
    divided = decompose(exported(name, tmp_path / "graph"), 4)
    for graph in divided.write(tmp_path / "segments"):
        onnx.checker.check_model(onnx.load(graph.onnx), full_check=True)
        reference = load_file(graph.reference)
        given = run(graph.onnx, {name: reference[f"inputs.{name}"] for name in graph.signature.names})
        np.testing.assert_array_equal(given, reference["outputs"])
        assert given.shape[1:] == graph.signature.output_shape


def test_residual_blocks_are_never_cut_within(tmp_path: Path) -> None:
    divided = decompose(exported("residual", tmp_path), 20)
    assert all(len(segment.reads) == 1 for segment in divided.segments)


def test_parallel_branches_are_segments_of_their_own(tmp_path: Path) -> None:
    divided = decompose(exported("branches", tmp_path), 8)
    first = divided.segments[0]
    assert len(divided.consumers(first)) == 2
    joined = divided.segments[3]
    assert {segment.writes for segment in divided.consumers(first)} == set(joined.reads)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_there_are_no_more_segments_than_wanted(most: int, tmp_path: Path) -> None:
    divided = decompose(exported("branches", tmp_path / "graph"), most)
    assert len(divided.segments) <= most
    values = rows(IMAGE, 3)
    graphs = divided.write(tmp_path / "segments")
    np.testing.assert_array_equal(together(divided, graphs, values), run(divided.graph.onnx, values))


def test_what_one_device_runs_in_a_row_is_merged(tmp_path: Path) -> None:
    whole = decompose(exported("residual", tmp_path / "graph"), 6)
    merged = whole.merged([0, 0, *(1 for _ in whole.segments[2:])])
    assert [segment.writes for segment in merged.segments] == [whole.segments[1].writes, whole.segments[-1].writes]
    values = rows(IMAGE, 3)
    graphs = merged.write(tmp_path / "segments")
    np.testing.assert_array_equal(together(merged, graphs, values), run(whole.graph.onnx, values))


def test_pairs_of_quantize_and_dequantize_stay_together(tmp_path: Path) -> None:
    graph = exported("residual", tmp_path / "graph")
    StaticQuantization(calibration_rows=4)(graph, rows(IMAGE, 4), "onnxruntime", tmp_path)
    quantized = replace(graph, onnx=tmp_path / "model.onnx", quantized=True)
    divided = decompose(quantized, 6)
    assert len(divided.segments) > 2
    for part in divided.write(tmp_path / "segments")[:-1]:  # the graph itself ends with one half of a pair
        model = onnx.load(part.onnx)
        written = {name: node.op_type for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in {it.name for it in model.graph.input}:
                pytest.fail("a pair was cut")
        assert written[model.graph.output[0].name] not in ("QuantizeLinear", "DequantizeLinear")
    values = rows(IMAGE, 3)
    graphs = divided.write(tmp_path / "again")
    np.testing.assert_array_equal(together(divided, graphs, values), run(quantized.onnx, values))
