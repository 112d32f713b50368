"""What is peculiar to the engine for FPGAs: widths, bits, and what its emulation does not say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hydra import initialize_config_module

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, rebuild, save
from hasten.core import schema
from hasten.core.errors import ConfigError, EngineError
from hasten.core.files import read_json
from hasten.core.interfaces import Graph, Input, Signature, Target
from hasten.core.preflight import check
from hasten.core.recipe import Composer
from hasten.engines.hls import Hls
from hasten.passes.quantization.affine import AffineQuantization
from hasten.stages.checkup import try_engine, write_tiny

TARGET = Target(device="fpga", threads=1, batch_size=1, engines=("eager", "hls"))
ROWS = np.random.default_rng(0).standard_normal((64, 6), dtype=np.float32)


@pytest.fixture
def _needs_hls4ml() -> None:
    pytest.importorskip("hls4ml", reason="pip install 'hasten[hls]'")
    if shutil.which("g++") is None:
        pytest.skip("needs g++: apt-get install g++")


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """One linear layer, 6 -> 4."""
    folder = tmp_path_factory.mktemp("linear")
    (folder / "module").mkdir()
    arch = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 4}
    signature = Signature(inputs=(Input(shape=(6,)),), output_shape=(4,))
    module, arch = build(arch, signature.inputs, (4,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, {"input": ROWS}, folder)


class Untrained:
    """A bench that trains nothing."""

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


@pytest.fixture(scope="module")
def quantized(linear: Graph, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The same with weights of 4 bits and activations of 6."""
    folder = tmp_path_factory.mktemp("quantized")
    bench: Any = Untrained()
    AffineQuantization(weight_bits=4, activation_bits=6)(linear, {"input": ROWS}, "hls", folder, bench)
    return replace(linear, onnx=folder / "model.onnx", quantized=True)


def _types(project: Path) -> dict[str, tuple[int, int]]:
    """Name of each type of a project -> its bits, and how many of them are left of the binary point."""
    found = re.findall(r"typedef ap_fixed<(\d+),(-?\d+)\S*> (\w+);", (project / "firmware" / "defines.h").read_text())
    return {name: (int(width), int(integer)) for width, integer, name in found}


def _integers(values: np.ndarray, width: int, integer: int) -> np.ndarray:
    """The nearest integers of a type, half to even, clipped."""
    scaled = np.round(values.astype(np.float64) * 2.0 ** (width - integer))
    return np.clip(scaled, -(2 ** (width - 1)), 2 ** (width - 1) - 1).astype(np.int64)


@pytest.mark.slow
@pytest.mark.usefixtures("_needs_hls4ml")
def test_gives_bit_by_bit_what_integers_give(linear: Graph, tmp_path: Path) -> None:
    engine = Hls(bits=8)
    engine.compile(linear, tmp_path)
    types = _types(tmp_path / "project")
    given, weight, bias, result = (types[name] for name in ("input_t", "layer0_weight_t", "layer0_bias_t", "result_t"))
    assert {given[0], weight[0], result[0]} == {8}
    module = rebuild(linear.module)
    weights = _integers(module.weight.detach().numpy(), *weight)
    biases = _integers(module.bias.detach().numpy(), *bias)
    rows = np.concatenate([ROWS, 20 * ROWS])  # some are clipped
    fraction = given[0] - given[1] + weight[0] - weight[1]
    sums = _integers(rows, *given) @ weights.T * 2 ** (bias[0] - bias[1] - fraction) + biases
    expected = _integers(sums / 2.0 ** (bias[0] - bias[1]), *result) / 2.0 ** (result[0] - result[1])
    np.testing.assert_array_equal(engine.load(tmp_path)(rows), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_needs_hls4ml")
def test_multiplies_the_recipes_widths(quantized: Graph, tmp_path: Path) -> None:
    engine = Hls()
    engine.compile(quantized, tmp_path / "compiled")
    shutil.move(tmp_path / "compiled", tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    widths = {width for width, _ in _types(folder / "project").values()}
    assert _types(folder / "project")["layer0_weight_t"] == (4, 4)
    assert 6 in widths
    assert engine.integer_share(folder) == 1
    session = onnxruntime.InferenceSession(quantized.onnx)
    expected = session.run(None, {"input": ROWS})[0]
    np.testing.assert_allclose(engine.load(folder)(ROWS), expected, atol=2e-3 * np.ptp(expected))
    assert str(tmp_path).encode() not in b"".join(each.read_bytes() for each in folder.rglob("*") if each.is_file())
    estimate = read_json(folder / "estimate.json")
    assert estimate["kind"] == "analytic estimate, not synthesis"
    assert any(note.startswith("analytic estimate, not synthesis: ") for note in engine.notes(folder))
    assert "times and memory are of the emulation on this CPU and say nothing about the FPGA" in engine.notes(folder)
    (operator,) = engine.operators(folder, [ROWS[:1]], repeats=2)
    assert operator.name == "emulation"
    with pytest.raises(EngineError, match=r"compiled for rows of shape \(6,\), got \(5,\)"):
        engine.load(folder)(ROWS[:, :5])


@pytest.mark.slow
@pytest.mark.usefixtures("_needs_hls4ml")
def test_a_convolution_agrees_with_eager_pytorch(tmp_path: Path) -> None:
    assert try_engine({"_target_": "hasten.engines.hls.Hls"}, write_tiny(tmp_path), TARGET) > 0


@pytest.mark.drill
@pytest.mark.usefixtures("_needs_hls4ml")
@pytest.mark.parametrize(
    "engine",
    [Hls(), Hls(io_type="io_stream"), Hls(strategy="resource", reuse_factor=4), Hls(backend="Quartus")],
    ids=["parallel", "stream", "resource", "quartus"],
)
def test_a_residual_network_agrees_with_eager_pytorch(graph: Graph, engine: Hls, tmp_path: Path) -> None:
    engine.compile(graph, tmp_path)
    assert read_json(tmp_path / "emulation.json")["difference"] < 0.01


def test_refuses_what_hls4ml_has_no_layer_for(reader: Graph, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="hls takes models of one input, got ids, mask"):
        Hls().compile(reader, tmp_path)


@pytest.mark.usefixtures("_needs_hls4ml")
def test_needs_a_compiler_and_an_fpga(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hls().supports(True, TARGET) is None
    assert "target.device is cpu" in (Hls().supports(True, replace(TARGET, device="cpu")) or "")
    assert Hls(synthesize=True).supports(True, TARGET) == (
        "engine.synthesize=true needs vitis-run on PATH: engine.synthesize=false"
    )
    monkeypatch.setenv("PATH", "")
    assert Hls().supports(True, TARGET) == "hls needs g++ for the emulation: apt-get install g++ or conda install gxx"


@pytest.fixture
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


@pytest.mark.usefixtures("_hydra", "_needs_hls4ml")
def test_no_objective_decides_by_the_time_of_an_emulation() -> None:
    recipe = ("engine=hls", "target=fpga")
    check(Composer.of((*recipe, "objective=size")).compose())
    with pytest.raises(ConfigError) as refused:
        check(Composer.of((*recipe, "objective=latency", "objective.max_memory_mb=9")).compose())
    assert refused.value.problems == (
        "engine=hls is emulated here, and its times and memory say nothing about the fpga: choose objective=size, got "
        "objective.optimize=p50, objective.max_memory_mb=9",
    )
