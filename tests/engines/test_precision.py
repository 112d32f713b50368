"""Calculating in bfloat16: what it gives, where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hasten.core import processor
from hasten.core.errors import ConfigError, EngineError
from hasten.core.interfaces import Engine, Graph, Target
from hasten.engines import checks
from hasten.engines.eager import Eager
from hasten.engines.inductor import AotInductor
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.openvino import OpenVino

TARGET = Target(device="cpu", threads=1, batch_size=1, engines=("eager", "inductor", "openvino"))
HALVED = (Eager(precision="bfloat16"), AotInductor(precision="bfloat16"), OpenVino(precision="bfloat16"))
needs_bfloat16 = pytest.mark.skipif(
    not processor.has_bfloat16(), reason="OpenVINO calculates in float32 where the processor has no bfloat16"
)


def _error(engine: Engine, graph: Graph, folder: Path) -> float:
    """Largest difference from eager float32, as a share of the range."""
    engine.compile(graph, folder)
    reference = load_file(graph.reference)
    outputs = engine.load(folder)(*(reference[f"inputs.{name}"] for name in graph.signature.names))
    assert outputs.dtype == np.float32
    return float(np.abs(outputs - reference["outputs"]).max() / np.ptp(reference["outputs"]))


@pytest.mark.parametrize(
    "engine",
    [
        Eager(precision="bfloat16"),
        Eager(precision="bfloat16", channels_last=True),
        pytest.param(OpenVino(precision="bfloat16", static_batch=1), marks=needs_bfloat16),
        pytest.param(AotInductor(precision="bfloat16", static_batch=1), marks=pytest.mark.drill),
    ],
    ids=["eager", "eager channels last", "openvino", "inductor"],
)
def test_is_as_far_off_as_eight_bits_are(engine: Engine, graph: Graph, reader: Graph, tmp_path: Path) -> None:
    """Between what 24 bits of mantissa could explain and what is refused; the transformer has integer inputs, a mask
    that it turns into float32 itself, and a dynamic length."""
    for name, source in (("graph", graph), ("reader", reader)):
        (tmp_path / name).mkdir()
        assert 2**-14 < _error(engine, source, tmp_path / name) < checks.TOLERANCES["bfloat16"]


def test_its_matrix_products_are_those_of_autocast(graph: Graph, tmp_path: Path) -> None:
    from hasten.artefacts.module import rebuild

    rows = np.random.default_rng(1).standard_normal((3, *graph.signature.inputs[0].shape), dtype=np.float32)
    Eager(precision="bfloat16").compile(graph, tmp_path)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = rebuild(graph.module)(torch.from_numpy(rows)).float().numpy()
    np.testing.assert_array_equal(Eager(precision="bfloat16").load(tmp_path)(rows), expected)


def test_outputs_that_are_further_off_are_refused_with_the_figures(graph: Graph, tmp_path: Path) -> None:
    reference = load_file(graph.reference)
    reference["outputs"] = reference["outputs"] + np.float32(0.06) * np.ptp(reference["outputs"])
    save_file(reference, tmp_path / "off.safetensors")
    with pytest.raises(EngineError, match=r"by [56]\.\d\d% of the output range on 24 rows; 5\.00% is allowed"):
        Eager(precision="bfloat16").compile(replace(graph, reference=tmp_path / "off.safetensors"), tmp_path)


def test_is_only_for_processors_that_have_it_and_targets_that_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in HALVED:
        monkeypatch.setattr(checks, "has_bfloat16", lambda: True)
        assert engine.supports(False, TARGET) is None
        refused = engine.supports(False, replace(TARGET, precisions=("float32", "int8")))
        assert refused == "engine.precision=bfloat16 is none of target.precisions=float32, int8"
        monkeypatch.setattr(checks, "has_bfloat16", lambda: False)
        assert "which has no instructions for it" in (engine.supports(False, TARGET) or "")


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_weights_lie_compressed_or_mapped_and_not_both(engine: type[OnnxRuntime | OpenVino]) -> None:
    with pytest.raises(ConfigError, match=r"mapped must be false .* got true \(engine\.mapped, engine\.compressed\)"):
        engine(mapped=True, compressed=True)


@pytest.mark.parametrize("engine", [OnnxRuntime(), OnnxRuntime(mapped=True), OpenVino(), OpenVino(mapped=True)])
def test_says_what_optimising_made_of_the_graph(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    """Six convolutions and a linear layer are left, the activations are fused into them."""
    engine.compile(graph, tmp_path)
    (note,) = engine.notes(tmp_path)
    words = note.split()
    run, exported = int(words[2]), int(words[-1])
    assert note == f"{engine.family} runs {run} operators where the exported graph has {exported}"
    assert 7 < run < exported
