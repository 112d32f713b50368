"""Compressed files come back bit for bit, and zeros among floats hardly cost anything."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from hasten.core.interfaces import Graph
from hasten.engines import stored
from hasten.engines.onnxruntime import OnnxRuntime

ODD = (0.0, -0.0, float("nan"), float("inf"), 1e-45, 0.5, -3.0)


def back(source: Path, folder: Path) -> bytes:
    stored.store(source, folder / source.name, compressed=True)
    return stored.read(folder / source.name)


def size(folder: Path) -> int:
    (file,) = folder.iterdir()
    return file.stat().st_size


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    values=st.lists(st.sampled_from(ODD), min_size=1, max_size=9),
    kind=st.sampled_from(["weights.safetensors", "model.onnx", "model.pt2"]),
)
def test_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], values: list[float], kind: str
) -> None:
    folder = tmp_path_factory.mktemp("stored")
    tensors = {f"{'n' * place}{place}": np.resize(np.float32(values), length) for place, length in enumerate(lengths)}
    tensors |= {"counts": np.arange(30, dtype=np.int64), "bytes": np.arange(5, dtype=np.uint8)}
    (folder / "given").mkdir()
    source = folder / "given" / kind
    if kind == "model.onnx":
        weights = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
        onnx.save(helper.make_model(helper.make_graph([], "weights", [], [], weights)), source)
    else:
        save_file(tensors, source)
    assert back(source, folder) == source.read_bytes()


def test_gives_back_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/nothing.bin").touch()
    assert back(tmp_path / "given/nothing.bin", tmp_path) == b""


@pytest.mark.parametrize("kind", ["safetensors", "onnx"])
def test_floats_cost_a_bit_each_and_their_bytes_where_they_are_not_zero(tmp_path: Path, kind: str) -> None:
    """Signs and mantissas of noise, 24 of 32 bits, can't be compressed; a bit for each place says which are left."""
    draw = np.random.default_rng(0)
    weights = np.where(draw.random(40_000) < 0.2, draw.normal(size=40_000), 0).astype(np.float32)
    source, folder = tmp_path / f"weights.{kind}", tmp_path / "stored"
    folder.mkdir()
    if kind == "onnx":
        tensor = helper.make_tensor("odd name", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)
        onnx.save(helper.make_model(helper.make_graph([], "weights", [], [], [tensor])), source)
    else:
        save_file({"weights": weights}, source)
    assert back(source, folder) == source.read_bytes()
    left = int((weights != 0).sum())
    assert 3 * left < size(folder) < 40_000 / 8 + 3.7 * left
    assert size(folder) < 0.85 * len(gzip.compress(source.read_bytes(), 6))


def test_reads_what_hasten_0_1_stored(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.gz").write_bytes(gzip.compress(graph.onnx.read_bytes(), 6, mtime=0))
    assert stored.read(tmp_path / "model.onnx") == graph.onnx.read_bytes()
    with stored.unpacked(tmp_path, compressed=True) as whole:
        assert (whole / "model.onnx").read_bytes() == graph.onnx.read_bytes()
    rows = np.ones((2, *graph.signature.inputs[0].shape), np.float32)
    plain = OnnxRuntime()
    (tmp_path / "plain").mkdir()
    shutil.copyfile(graph.onnx, tmp_path / "plain/model.onnx")
    np.testing.assert_array_equal(
        OnnxRuntime(compressed=True).load(tmp_path)(rows), plain.load(tmp_path / "plain")(rows)
    )
