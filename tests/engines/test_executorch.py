"""What is peculiar to ExecuTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.artefacts.module import forward, rebuild
from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Runner, Target
from hasten.engines.executorch import ExecuTorch
from hasten.stages.checkup import try_engine, write_tiny

TARGET = Target(device="cpu", threads=1, batch_size=1, engines=("executorch",))
INSTALLED = pytest.mark.skipif(find_spec("executorch") is None, reason="pip install 'hasten[executorch]'")


@pytest.fixture(scope="module")
def cnn(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runner]:
    """The residual CNN for two rows a call."""
    folder, engine = tmp_path_factory.mktemp("compiled"), ExecuTorch(static_batch=2, compressed=True)
    engine.compile(graph, folder)
    return folder, engine.load(folder)


@pytest.fixture(scope="module")
def transformer(reader: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runner]:
    folder = tmp_path_factory.mktemp("compiled")
    ExecuTorch().compile(reader, folder)
    return folder, ExecuTorch().load(folder)


def _eager(graph: Graph, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return forward(rebuild(graph.module), {name: torch.tensor(values) for name, values in rows.items()}).numpy()


@INSTALLED
def test_agrees_with_eager_pytorch_for_any_number_of_rows(graph: Graph, cnn: tuple[Path, Runner]) -> None:
    _, run = cnn
    kept = run(np.ones((1, 3, 8, 8)))
    first = kept.copy()
    for number in (1, 2, 5):
        rows = np.random.default_rng(number).standard_normal((number, 3, 8, 8), dtype=np.float32)
        np.testing.assert_allclose(run(rows), _eager(graph, {"input": rows}), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(kept, first)


@INSTALLED
@pytest.mark.parametrize(("number", "length"), [(1, 10), (3, 4), (1, 1)])
def test_takes_several_inputs_of_any_length(
    reader: Graph, transformer: tuple[Path, Runner], number: int, length: int
) -> None:
    _, run = transformer
    mask = np.arange(length) < np.random.default_rng(0).integers(1, length + 1, (number, 1))
    rows = {"ids": np.random.default_rng(1).integers(0, 30, (number, length)), "mask": mask.astype(np.int64)}
    np.testing.assert_allclose(run(*rows.values()), _eager(reader, rows), rtol=1e-4, atol=1e-5)


@INSTALLED
def test_refuses_rows_of_a_shape_that_it_was_not_compiled_for(cnn: tuple[Path, Runner]) -> None:
    with pytest.raises(EngineError, match=r"compiled for rows of input of shape \(3, 8, 8\), got \(3, 8, 9\)"):
        cnn[1](np.ones((1, 3, 8, 9)))


@INSTALLED
def test_says_what_the_delegate_left_and_where_the_time_goes(
    cnn: tuple[Path, Runner], transformer: tuple[Path, Runner]
) -> None:
    (note,) = ExecuTorch().notes(transformer[0])
    assert note.startswith("XNNPACK runs ")
    assert "embedding" in note or "native_layer_norm" in note or "view_copy" in note
    engine = ExecuTorch(static_batch=2, compressed=True)
    operators = engine.operators(cnn[0], [np.ones((3, 3, 8, 8), np.float32)], repeats=3)
    assert "convolution" in {each.kind for each in operators}
    assert all(each.milliseconds >= 0 for each in operators)
    assert sum(each.milliseconds for each in operators) > 0
    assert engine.integer_share(cnn[0]) == 0


@INSTALLED
def test_does_not_take_the_threads_from_a_loaded_program(cnn: tuple[Path, Runner]) -> None:
    with pytest.raises(EngineError, match=r"loaded an ExecuTorch program for 1 threads, .*engine\.threads=2"):
        ExecuTorch(threads=2, static_batch=2, compressed=True).load(cnn[0])


@INSTALLED
def test_a_broken_program_is_an_engine_error(cnn: tuple[Path, Runner], tmp_path: Path) -> None:
    (tmp_path / "signature.json").write_bytes((cnn[0] / "signature.json").read_bytes())
    (tmp_path / "model.pte").write_bytes(b"no program")
    with pytest.raises(EngineError, match=r"^executorch refused the program: \S"):
        ExecuTorch().load(tmp_path)


@INSTALLED
@pytest.mark.slow
def test_works_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert try_engine({"_target_": "hasten.engines.executorch.ExecuTorch"}, write_tiny(tmp_path), TARGET) > 0


def test_refuses_a_quantized_graph(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="executorch runs no quantized graph"):
        ExecuTorch().compile(replace(graph, quantized=True), tmp_path)
    assert ExecuTorch().supports(True, TARGET) is not None


def test_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engines.checks.find_spec", lambda _: None)
    assert ExecuTorch().supports(False, TARGET) == "executorch is not installed: pip install 'hasten[executorch]'"
