"""What is peculiar to the engine that goes through StableHLO."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, forward, rebuild, save
from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Input, Signature, Target
from hasten.engines.xla import Xla

jax = pytest.importorskip("jax", reason="pip install 'hasten[xla]'")

TARGET = Target(device="tpu", threads=2, batch_size=1, engines=("eager", "xla"))
IMAGES, STEPS = (Input(shape=(1, 8, 8)),), (Input(shape=(3, 8)),)
TOKENS = tuple(Input(name=name, shape=(6,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
MODELS: dict[str, tuple[dict[str, Any], tuple[Input, ...]]] = {
    "cifar_resnet.CifarResNet": ({"num_blocks": 1, "widths": [4, 6, 8]}, IMAGES),
    "recurrent.Recurrent": ({"cell": "gru", "hidden": 6, "num_layers": 2}, STEPS),
    "transformer.Transformer": (
        {"width": 8, "num_layers": 1, "num_heads": 2, "feedforward": 16, "vocabulary_size": 9},
        TOKENS,
    ),
}


def _graph(target: str, folder: Path) -> Graph:
    settings, inputs = MODELS[target]
    (folder / "module").mkdir(parents=True)
    signature = Signature(inputs=inputs, output_shape=(3,))
    node = {"_target_": f"hasten.models.{target}", **settings}
    module, arch = build(node, inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, _rows(inputs, 8), folder)


def _rows(inputs: tuple[Input, ...], number: int, length: int | None = None) -> dict[str, np.ndarray]:
    draw, rows = np.random.default_rng(0), {}
    for each in inputs:
        shape = (number, *((length or each.shape[0],) if each.dynamic else each.shape))
        high = 2 if each.name == "mask" else 9
        rows[each.name] = (
            draw.standard_normal(shape, dtype=np.float32) if each.dtype == "float32" else draw.integers(1, high, shape)
        )
    return rows


@pytest.mark.parametrize("target", MODELS)
def test_one_program_serves_any_rows_and_lengths(target: str, tmp_path: Path) -> None:
    graph, engine = _graph(target, tmp_path / "graph"), Xla(static_batch=2)
    (tmp_path / "compiled").mkdir()
    engine.compile(graph, tmp_path / "compiled")
    run = engine.load(tmp_path / "compiled")
    for number, length in ((2, None), (1, 3), (5, 6)):
        rows = _rows(graph.signature.inputs, number, length)
        with torch.no_grad():
            expected = forward(rebuild(graph.module), {name: torch.tensor(each) for name, each in rows.items()}).numpy()
        np.testing.assert_allclose(run(*rows.values()), expected, rtol=1e-4, atol=1e-5)


def test_the_artefact_is_portable_data_for_cpus_and_tpus(graph: Graph, tmp_path: Path) -> None:
    Xla().compile(graph, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.stablehlo", "signature.json"}
    program = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "tpu")
    assert "stablehlo.convolution" in program.mlir_module()


def test_calculates_in_bfloat16_within_its_tolerance(graph: Graph, tmp_path: Path) -> None:
    folders = {precision: tmp_path / precision for precision in ("float32", "bfloat16")}
    rows = np.random.default_rng(0).standard_normal((4, *graph.signature.inputs[0].shape), dtype=np.float32)
    outputs = {}
    for precision, folder in folders.items():
        folder.mkdir()
        engine = Xla(precision=precision)
        engine.compile(graph, folder)
        outputs[precision] = engine.load(folder)(rows)
    differ = np.abs(outputs["float32"] - outputs["bfloat16"]).max() / np.ptp(outputs["float32"])
    assert 1e-5 < differ < 0.05


def test_says_where_the_time_of_a_request_goes(graph: Graph, tmp_path: Path) -> None:
    engine = Xla()
    engine.compile(graph, tmp_path)
    rows = np.zeros((1, *graph.signature.inputs[0].shape), np.float32)
    operators = engine.operators(tmp_path, [rows], repeats=3)
    kinds = {each.kind for each in operators}
    assert {"convolution", "linear"} <= kinds
    assert all(each.milliseconds >= 0 and each.calls > 0 for each in operators)


def test_sizes_the_pool_by_its_threads_and_writes_nothing(graph: Graph, tmp_path: Path) -> None:
    Xla(threads=2).compile(graph, tmp_path)
    code = (
        "import os, sys, numpy; from pathlib import Path; from hasten.engines.xla import Xla;"
        "run = Xla(threads=2).load(Path(sys.argv[1]));"
        f"run(numpy.zeros((1, {', '.join(map(str, graph.signature.inputs[0].shape))}), 'float32'));"
        "names = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')];"
        "assert sum('XLAEigen' in name for name in names) == 2, names"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_fits_tpus_and_no_quantized_graph(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engines.xla.num_tpus", lambda: 1)
    assert Xla().supports(False, TARGET) is None
    assert "xla runs on cpu or tpu, target.device is fpga" in (
        Xla().supports(False, replace(TARGET, device="fpga")) or ""
    )
    assert "in floats" in (Xla().supports(True, TARGET) or "")
    with pytest.raises(EngineError, match="in floats"):
        Xla().compile(replace(graph, quantized=True), tmp_path)


def test_times_on_a_cpu_are_not_given_out_for_those_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.engines.xla.num_tpus", lambda: 0)
    assert "no TPU is seen here" in (Xla().supports(False, TARGET) or "")
    assert Xla().supports(False, replace(TARGET, device="cpu")) is None
