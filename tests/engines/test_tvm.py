"""What is peculiar to TVM."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.artefacts.module import forward, rebuild
from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Runner, Target
from hasten.engines.tvm import Tvm

TARGET = Target(device="cpu", threads=1, batch_size=1, engines=("tvm",))
INSTALLED = pytest.mark.skipif(find_spec("tvm") is None, reason="pip install 'hasten[tvm]'")
UNTUNED = Tvm(static_batch=2, tuning_seconds=0, max_slowdown=None)


@pytest.fixture(scope="module")
def untuned(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runner]:
    folder = tmp_path_factory.mktemp("compiled")
    UNTUNED.compile(graph, folder)
    return folder, UNTUNED.load(folder)


@INSTALLED
def test_agrees_with_eager_pytorch_for_any_number_of_rows(graph: Graph, untuned: tuple[Path, Runner]) -> None:
    _, run = untuned
    kept = run(np.ones((1, 3, 8, 8)))
    first = kept.copy()
    for number in (1, 2, 5):
        rows = np.random.default_rng(number).standard_normal((number, 3, 8, 8), dtype=np.float32)
        with torch.no_grad():
            expected = forward(rebuild(graph.module), {"input": torch.tensor(rows)}).numpy()
        np.testing.assert_allclose(run(rows), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(kept, first)


@INSTALLED
def test_refuses_rows_of_a_shape_that_it_was_not_compiled_for(untuned: tuple[Path, Runner]) -> None:
    with pytest.raises(EngineError, match=r"compiled for rows of input of shape \(3, 8, 8\), got \(3, 8, 9\)"):
        untuned[1](np.ones((1, 3, 8, 9)))


@INSTALLED
def test_says_where_the_time_goes(untuned: tuple[Path, Runner]) -> None:
    operators = UNTUNED.operators(untuned[0], [np.ones((4, 3, 8, 8), np.float32)], repeats=3)
    assert sum(each.calls for each in operators if each.kind == "linear") == 2, "one layer in two parts of two rows"
    assert "convolution" in {each.kind for each in operators}
    assert all(each.milliseconds > 0 for each in operators)
    assert UNTUNED.notes(untuned[0]) == ("tvm runs untuned kernels (engine.tuning_seconds=0)",)


@INSTALLED
@pytest.mark.slow
def test_tuned_kernels_are_faster_and_still_right(graph: Graph, tmp_path: Path) -> None:
    engine = Tvm(tuning_seconds=3, max_slowdown=None)
    if reason := engine.supports(False, TARGET):
        pytest.skip(reason)
    engine.compile(graph, tmp_path)
    (note,) = engine.notes(tmp_path)
    assert note.startswith("tvm tuned ")
    assert "tuned 0 kernels" not in note


@INSTALLED
def test_refuses_what_is_slower_than_allowed(graph: Graph, tmp_path: Path) -> None:
    engine = replace(UNTUNED, max_slowdown=1e-6)
    with pytest.raises(EngineError, match=r"slower than eager PyTorch here, engine\.max_slowdown=1e-06 allows 1e-06x"):
        engine.compile(graph, tmp_path)


@INSTALLED
def test_a_broken_library_is_an_engine_error(untuned: tuple[Path, Runner], tmp_path: Path) -> None:
    (tmp_path / "signature.json").write_bytes((untuned[0] / "signature.json").read_bytes())
    (tmp_path / "model.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"^tvm refused the library: \S"):
        UNTUNED.load(tmp_path)


def test_refuses_quantized_graphs_and_dynamic_lengths(graph: Graph, reader: Graph, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tvm runs no quantized graph"):
        UNTUNED.compile(replace(graph, quantized=True), tmp_path)
    with pytest.raises(EngineError, match="tvm compiles fixed shapes: input ids has a dynamic length"):
        UNTUNED.compile(reader, tmp_path)


def test_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engines.checks.find_spec", lambda _: None)
    assert Tvm().supports(False, TARGET) == "apache-tvm is not installed: pip install 'hasten[tvm]'"


@pytest.mark.parametrize(("found", "refused"), [("0.1.14.post0", False), ("0.1.15", True), ("0.2.0rc1", True)])
def test_does_not_tune_with_a_library_that_crashes(
    monkeypatch: pytest.MonkeyPatch, found: str, *, refused: bool
) -> None:
    monkeypatch.setattr("hasten.engines.checks.find_spec", lambda _: True)
    monkeypatch.setattr("hasten.engines.tvm.version", lambda _: found)
    reason = Tvm(tuning_seconds=1).supports(False, TARGET)
    assert (reason is not None and f"apache-tvm-ffi {found} crashes tvm's tuning" in reason) == refused
    assert Tvm(tuning_seconds=0).supports(False, TARGET) is None
