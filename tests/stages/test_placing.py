"""Sharing out a model: what is chosen is what measured best, and one device where several gain nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, save
from hasten.core.construct import construct
from hasten.core.errors import ConfigError, EngineError
from hasten.core.files import read_json
from hasten.core.interfaces import Device, Graph, Input, Signature, Silent, Target
from hasten.core.recipe import Composer
from hasten.evidence.latency import CANDIDATE, LatencyProtocol, Measurement
from hasten.reporting.placement import sentences, tables, write_chart
from hasten.stages.engine import engine_family, engine_node, engines
from hasten.stages.placing import PLACEMENT, Plan, choose, place

BATCH = 2
ENGINE = "hasten.engines.onnxruntime.OnnxRuntime"


def plan(name: str, *devices: str) -> Plan:
    return Plan(name=name, folder=Path(name), devices=devices, seconds=1.0, stages=("output",))


PLANS = (plan("one", "a"), plan("other", "b"), plan("both", "a", "b"))


def measured(*microseconds: float, noise: float = 0.0) -> Measurement:
    """Rounds of a call each around those times, of the plans in their order."""
    draw = np.random.default_rng(0)
    names = (CANDIDATE, "other", "both")
    return Measurement(
        blocks_us={
            name: tuple((float(it * (1 + noise * draw.standard_normal())),) for _ in range(20))
            for name, it in zip(names, microseconds, strict=True)
        },
        memory_bytes={},
        batch_size=8,
        cpus=(0,),
        environment={},
        protocol=LatencyProtocol(),
        seed=0,
        stream=True,
    )


def test_several_devices_are_chosen_where_they_are_faster() -> None:
    choice = choose(PLANS, measured(1000, 900, 500), throughput=True)
    assert choice["chosen"] == "both"
    assert "1.80x" in choice["why"]
    assert "best single device, other" in choice["why"]
    assert choice["plans"][0]["seconds"]["value"] == pytest.approx(1e-3)


@pytest.mark.parametrize("others", [890.0, 950.0])
def test_the_best_single_device_is_chosen_where_several_are_not_surely_faster(others: float) -> None:
    choice = choose(PLANS, measured(1000, 900, others, noise=0.05), throughput=True)
    assert choice["chosen"] == "other"
    assert choice["why"].endswith("other is used.")


def test_requests_are_judged_by_their_median() -> None:
    """A pause that comes rarely lengthens the mean alone."""
    blocks = {
        CANDIDATE: ((1000.0,) * 9 + (9000.0,),) * 20,
        "other": ((1200.0,) * 10,) * 20,
        "both": ((1100.0,) * 10,) * 20,
    }
    timings = Measurement(**{**vars(measured(1, 1, 1)), "blocks_us": blocks, "stream": False})
    assert choose(PLANS, timings, throughput=False)["chosen"] == "one"


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    (tmp_path / "module").mkdir()
    inputs = (Input(shape=(3, 32, 32)),)
    arch = {"_target_": "hasten.models.cifar_resnet.CifarResNet", "num_blocks": 1}
    module, arch = build(arch, inputs, (4,), seed=0)
    save(tmp_path / "module", arch, module)
    rows = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)
    return write_graph(
        module, tmp_path / "module", Signature(inputs=inputs, output_shape=(4,)), {"input": rows}, tmp_path
    )


@pytest.fixture
def _own_measuring_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


def target(cpus: Sequence[int]) -> Target:
    devices = tuple(Device(name=f"core{cpu}", engine="onnxruntime", cpus=(cpu,)) for cpu in cpus)
    return Target(device="cpu", threads=2, batch_size=BATCH, engines=("placed",), devices=devices)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_measuring_lock")
def test_what_is_placed_answers_like_the_graph_and_says_what_was_measured(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = LatencyProtocol(min_rounds=2, max_rounds=2, max_starved=0.99, warm_up_seconds=0.0)
    monkeypatch.setattr("hasten.stages.placing.IN_TURNS", brief)
    wanted = target(sorted(os.sched_getaffinity(0))[:2])
    node = {
        "_target_": "hasten.engines.placed.Placed",
        "between": [
            {"name": it.name, "cpus": list(it.cpus), "engine": {"_target_": ENGINE, "threads": 1}}
            for it in wanted.devices
        ],
        "optimize": "throughput",
        "max_segments": 3,
        "in_flight": 2,
        "timeout": 60.0,
    }
    folder = tmp_path / "placed"
    (why,) = place(graph, node, wanted, 0, folder, Silent())
    rows = np.random.default_rng(1).standard_normal((BATCH, 3, 32, 32), dtype=np.float32)
    whole = tmp_path / "whole"
    whole.mkdir()
    engine = construct({"_target_": ENGINE}, "engine")
    engine.compile(graph, whole)
    outputs = construct(node, "engine").load(folder)(rows)
    np.testing.assert_allclose(outputs, engine.load(whole)(rows), rtol=1e-4, atol=1e-5)
    found = read_json(folder / PLACEMENT)
    names = [device.name for device in wanted.devices]
    kinds = [it["name"] for it in found["plans"]]
    assert [it for it in kinds if not it.startswith("split for ")] == [*names, f"copies on {', '.join(names)}"]
    assert found["chosen"] in kinds
    assert why in sentences(found)
    assert sum(segment["share"] for segment in found["segments"]) == pytest.approx(1)
    for chart in found["charts"]:
        for bars in (chart["predicted"], chart["measured"]):
            assert {device for _, _, device, *_ in bars} <= set(names)
            assert min(start for *_, start, _ in bars) == 0
            assert all(end > start for *_, start, end in bars)
    titles = [title for title, _, _ in tables(found)]
    assert len(titles) == 3
    write_chart(found, tmp_path)
    assert "<svg" in (tmp_path / "gantt.svg").read_text()


@pytest.mark.usefixtures("hydra")
def test_a_device_takes_the_node_of_its_engine_with_its_own_threads() -> None:
    recipe = Composer.of(["target=mixed", "engine=placed"]).compose()
    node = engine_node(recipe)
    assert [it["engine"]["_target_"] for it in node["between"]] == ["hasten.engines.openvino.OpenVino"] * 2
    assert [it["engine"]["threads"] for it in node["between"]] == [1, 1]
    assert node["between"][0]["engine"]["static_batch"] == recipe.section("target")["batch_size"]
    assert engine_family(recipe) == "openvino"
    assert engines(recipe) == ["hasten.engines.placed.Placed", "hasten.engines.openvino.OpenVino"]
    plain = Composer.of(["engine=onnxruntime"]).compose()
    assert engine_node(plain) == plain.section("engine")
    assert engine_family(plain) == "onnxruntime"


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("engine", "told"), [("tensorflow", "no option of engine"), ("placed", "needs devices itself")]
)
def test_an_engine_that_no_device_can_have_is_named(engine: str, told: str) -> None:
    device = f"target.devices=[{{name: a, engine: {engine}, cpus: [0]}}]"
    with pytest.raises(ConfigError, match=rf"target.devices\[0\].engine.*{told}"):
        engine_node(Composer.of(["target=mixed", "engine=placed", device]).compose())


@pytest.mark.usefixtures("_own_measuring_lock")
def test_no_device_that_can_run_the_graph_is_an_error(graph: Graph, tmp_path: Path) -> None:
    (cpu, *_) = os.sched_getaffinity(0)
    eager = {"name": "a", "cpus": [cpu], "engine": {"_target_": "hasten.engines.eager.Eager"}}
    node = {"_target_": "hasten.engines.placed.Placed", "between": [eager], "optimize": "p50", "max_segments": 2}
    quantized = Graph(**{**vars(graph), "quantized": True})
    with pytest.raises(EngineError, match=r"none of target\.devices can run the graph"):
        place(quantized, node, target([cpu]), 0, tmp_path / "placed", Silent())
