"""What is peculiar to the engine that compiles native code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, forward, rebuild, save
from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Input, Runner, Signature, Target
from hasten.engines.inductor import AotInductor

TARGET = Target(device="cpu", threads=1, batch_size=1, engines=("inductor",))
THREES = AotInductor(static_batch=3, compressed=True)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One linear layer, 6 -> 4."""
    folder = tmp_path_factory.mktemp("linear")
    (folder / "module").mkdir()
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 4}
    signature = Signature(inputs=(Input(shape=(6,)),), output_shape=(4,))
    module, arch = build(arch, signature.inputs, (4,), seed=0)
    save(folder / "module", arch, module)
    rows = np.random.default_rng(0).standard_normal((8, 6), dtype=np.float32)
    return write_graph(module, folder / "module", signature, {"input": rows}, folder)


@pytest.fixture(scope="module")
def in_threes(linear: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The linear layer compiled for three rows; all temporary files of that would be found in its parent."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root))
        patch.setattr(tempfile, "tempdir", None)
        environment, threads = dict(os.environ), torch.get_num_threads()
        (root / "compiled").mkdir()
        THREES.compile(linear, root / "compiled")
        assert dict(os.environ) == environment
    torch.set_num_threads(threads)
    return root / "compiled"


@pytest.fixture(scope="module")
def any_size(reader: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runner]:
    """The transformer compiled for any number of rows of any length."""
    folder, engine = tmp_path_factory.mktemp("compiled"), AotInductor()
    engine.compile(reader, folder)
    return folder, engine.load(folder)


def _eager(graph: Graph, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return forward(rebuild(graph.module), {name: torch.tensor(values) for name, values in rows.items()}).numpy()


def _texts(number: int, length: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    mask = np.arange(length) < draw.integers(1, length + 1, (number, 1))
    return {"ids": draw.integers(0, 30, (number, length)), "mask": mask.astype(np.int64)}


@pytest.mark.drill
def test_agrees_with_eager_pytorch_for_any_rows_and_lengths(reader: Graph, any_size: tuple[Path, Runner]) -> None:
    _, run = any_size
    kept = run(*_texts(1, 10).values())
    first = kept.copy()
    for number, length in ((1, 10), (3, 4), (7, 1), (2, 9)):
        rows = _texts(number, length)
        np.testing.assert_allclose(run(*rows.values()), _eager(reader, rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(kept, first)


@pytest.mark.drill
def test_says_where_the_time_of_a_request_goes(
    any_size: tuple[Path, Runner], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = any_size
    operators = AotInductor().operators(folder, list(_texts(1, 10).values()), repeats=5)
    assert {"linear", "normalization"} <= {each.kind for each in operators}
    assert all(each.milliseconds >= 0 for each in operators)
    assert sum(each.milliseconds for each in operators) > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.drill
def test_refuses_rows_of_a_shape_that_it_was_not_compiled_for(any_size: tuple[Path, Runner]) -> None:
    _, run = any_size
    ids, mask = _texts(2, 10).values()
    with pytest.raises(EngineError, match=r"compiled for rows of mask of shape \(10,\), got \(11,\)"):
        run(ids, np.ones((2, 11), np.int64))
    with pytest.raises(EngineError, match=r"rows of ids of shape \(10,\), got \(10, 1\)"):
        run(ids[..., None], mask)
    with pytest.raises(ValueError, match="shorter"):
        run(ids)


@pytest.mark.slow
def test_runs_other_numbers_of_rows_in_parts_of_what_it_was_compiled_for(linear: Graph, in_threes: Path) -> None:
    run = THREES.load(in_threes)
    for number in (1, 2, 3, 4, 7):
        rows = {"input": np.random.default_rng(number).standard_normal((number, 6))}
        expected = _eager(linear, {"input": rows["input"].astype(np.float32)})
        np.testing.assert_allclose(run(rows["input"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_leaves_no_files_but_its_own(in_threes: Path) -> None:
    assert {file.name for file in in_threes.iterdir()} == {"model.pt2.packed.gz", "profiled.pt2", "signature.json"}
    assert [file.name for file in in_threes.parent.iterdir()] == ["compiled"]


@pytest.mark.slow
def test_runs_nothing_in_integers(in_threes: Path) -> None:
    assert THREES.integer_share(in_threes) == 0


@pytest.mark.slow
def test_a_broken_package_is_an_engine_error(in_threes: Path, tmp_path: Path) -> None:
    for file in ("signature.json", "model.pt2"):
        (tmp_path / file).write_bytes((in_threes / "signature.json").read_bytes())
    with pytest.raises(EngineError, match=r"^inductor refused the package: \S.*$"):
        AotInductor().load(tmp_path)


def test_refuses_a_quantized_graph(linear: Graph, tmp_path: Path) -> None:
    reason = "inductor runs no quantized graph: choose engine=onnxruntime or engine=openvino"
    assert AotInductor().supports(True, TARGET) == reason
    with pytest.raises(EngineError, match=reason):
        AotInductor().compile(replace(linear, quantized=True), tmp_path)


def test_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    wanted = "inductor needs a C++ compiler (g++ or $CXX): apt-get install g++ or conda install gxx"
    assert AotInductor().supports(False, TARGET) == wanted
    monkeypatch.setenv("CXX", "sh")
    assert AotInductor().supports(False, TARGET) is None
    assert AotInductor(threads=4).supports(False, TARGET) == "engine.threads=4 is more than target.threads=1 allows"


def test_says_that_it_compiles_native_code() -> None:
    assert AotInductor.native_code
