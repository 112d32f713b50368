from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.passes.quantization.mixed import MixedPrecision


class Uneven(nn.Module):
    """Three linear layers of two shapes; rounding hurts the last one, whose largest weight meets nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fragile = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.second.weight[0] = 0.0
            self.second.bias[0] = -1.0
            self.fragile.weight[:, 0] = 300.0

    def forward(self, values: Tensor) -> Tensor:
        return self.fragile(torch.relu(self.second(torch.relu(self.first(values)))))


class Bench:
    """A clock by which each layer in floats takes a given time longer, by its place, and any integers some time."""

    def __init__(self, gains: Sequence[float], integers: float) -> None:
        self._gains = gains
        self._integers = integers
        self.timed: list[list[int]] = []

    def graph_latencies_ms(self, graphs: Sequence[Graph]) -> list[float]:
        timed = [floats(graph.onnx) if graph.quantized else [0, 1, 2] for graph in graphs]
        self.timed = self.timed or timed
        return [
            10 + self._integers * graph.quantized + sum(self._gains[place] for place in places)
            for graph, places in zip(graphs, timed, strict=True)
        ]


def floats(file: Path) -> list[int]:
    """Places of the layers that read float weights as they are."""
    model = onnx.load(file)
    read = {each.name for each in model.graph.initializer if each.data_type == each.FLOAT and len(each.dims) > 1}
    linear = [node for node in model.graph.node if node.op_type == "Gemm"]
    return [place for place, node in enumerate(linear) if read.intersection(node.input)]


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=(8,)),), output_shape=(3,))
    module, arch = build({"_target_": f"{__name__}.Uneven"}, signature.inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, rows(16), folder)


def rows(number: int) -> Columns:
    return {"input": np.random.default_rng(0).standard_normal((number, 8), dtype=np.float32)}


def _mixed(
    graph: Graph, folder: Path, gains: Sequence[float], max_error: float, integers: float = 0.0
) -> tuple[list[int], tuple[str, ...]]:
    bench = Bench(gains, integers)
    notes = MixedPrecision(max_error=max_error, weights="s8")(graph, rows(64), "onnxruntime", folder, bench)  # type: ignore[arg-type]
    assert bench.timed == [[], [0, 1], [2]], "layers of one shape are timed together"
    return floats(folder / "model.onnx"), notes


def test_quantizes_everything_that_gains_within_a_wide_bound(uneven: Graph, tmp_path: Path) -> None:
    kept, (note,) = _mixed(uneven, tmp_path, [0.2, 0.2, 1.0], max_error=100)
    assert kept == []
    assert note.startswith("3 of 3 layers run in 8 bits, with an error of ")
    assert note.endswith("a request takes 10.0000 ms, in floats 11.4000 ms")


def test_what_gains_nothing_stays_float(uneven: Graph, tmp_path: Path) -> None:
    kept, notes = _mixed(uneven, tmp_path, [-0.1, -0.1, 1.0], max_error=100)
    assert kept == [0, 1]
    assert notes[1].startswith("float, as 8 bits gain nothing: first (-0.1000 ms, error ")


def test_what_is_too_sensitive_stays_float(uneven: Graph, tmp_path: Path) -> None:
    kept, notes = _mixed(uneven, tmp_path, [0.2, 0.2, 1.0], max_error=0.1)
    assert kept == [2]
    assert notes[1].startswith("float, as the error would be too large: fragile (+1.0000 ms, error ")


def test_keeps_the_bound(uneven: Graph, tmp_path: Path) -> None:
    import onnxruntime

    _mixed(uneven, tmp_path, [0.2, 0.2, 1.0], max_error=0.1)
    given = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, dict(rows(64)))[0]
    with torch.no_grad():
        wanted = rebuild(uneven.module)(torch.tensor(rows(64)["input"])).numpy()
    assert np.sqrt(np.mean((given - wanted) ** 2) / np.mean((wanted - wanted.mean(0)) ** 2)) <= 0.1


def test_says_that_nothing_fits(uneven: Graph, tmp_path: Path) -> None:
    with pytest.raises(
        PassError, match=r"no layer gains .* max_error=0\.1 \(0 of 3 gain at all; quantization.max_error\)"
    ):
        _mixed(uneven, tmp_path, [0.0, 0.0, -1.0], max_error=0.1)
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_slower_as_a_whole(uneven: Graph, tmp_path: Path) -> None:
    """Each layer pays where the others are integers; the floats are faster than all of them."""
    with pytest.raises(PassError, match=r"no choice of layers is faster .* takes 12\.0000 ms, in floats 11\.4000 ms"):
        _mixed(uneven, tmp_path, [0.2, 0.2, 1.0], max_error=100, integers=2.0)
    assert not list(tmp_path.iterdir())


def test_depends_on_the_target() -> None:
    assert MixedPrecision().measures
