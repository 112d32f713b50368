"""`hasten run`: one recipe, built, measured and left on disk."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import hasten as package
from hasten import cli
from hasten.core.files import read_json
from hasten.core.interfaces import Target
from hasten.core.objective import Objective
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.stages.evaluate import Evaluator

pytestmark = pytest.mark.slow

BY_ITSELF = "target.engines=[eager]"
"""Saves the comparison with other engines where it is not what a test is about."""


def test_leaves_the_config_the_result_the_report_and_the_model(ran: Any) -> None:
    assert ran.code == 0
    assert sorted(path.name for path in ran.folder.iterdir()) == [
        *("config.yaml", "data.json", "model", "plots", "report.html", "summary.json")
    ]
    config = OmegaConf.load(ran.folder / "config.yaml")
    assert config.engine._target_.endswith("OnnxRuntime")
    assert list(config.model.arch.widths) == [8]
    assert "<html" in (ran.folder / "report.html").read_text()
    assert {path.name for path in (ran.folder / "model").iterdir()} == {"README.md", "model.json", "model.onnx"}


def test_the_summary_says_what_was_gained_and_what_is_certified(ran: Any) -> None:
    summary = ran.summary
    assert {"baseline", "best", "speedup", "size_ratio", "certificate", "overrides", "trials"} <= summary.keys()
    assert summary["speedup"].keys() == {"eager", "engine", "previous"}
    for ratio in summary["speedup"].values():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert {"held", "metric", "margin", "bound", "confidence", "rows"} <= summary["certificate"].keys()
    trial_keys = {"overrides", "strategy", "bottleneck", "verdict", "reason", "expected_gain", "measured_gain"}
    assert all(trial_keys <= trial.keys() for trial in summary["trials"])
    sizes = [summary[which]["evaluation"]["size_bytes"] for which in ("baseline", "best")]
    assert summary["size_ratio"] == pytest.approx(sizes[0] / sizes[1])
    assert summary["overrides"] == summary["best"]["overrides"]


def test_one_recipe_is_one_trial_after_the_baseline(ran: Any) -> None:
    baseline, given = ran.summary["trials"]
    assert (baseline["number"], baseline["parent"], baseline["strategy"]) == (0, None, "baseline")
    assert (given["number"], given["parent"], given["strategy"]) == (1, 0, "given")
    assert given["edit"] == ["engine=onnxruntime"]
    assert given["verdict"] in ("accepted", "rejected")
    assert given["reason"] in " ".join(ran.printed.split())


def test_an_engine_costs_the_model_no_quality(ran: Any) -> None:
    certificate = ran.summary["certificate"]
    assert certificate["held"]
    assert certificate["baseline"] == certificate["candidate"]
    assert certificate["rows"] == 494
    assert " ".join(certificate["statement"].split()) in " ".join(ran.printed.replace("│", " ").split())


def test_the_printed_command_rebuilds_it_from_the_store(
    ran: Any, tiny: tuple[str, ...], store: Path, created: Callable[[Path], dict[str, float]], tmp_path: Path
) -> None:
    (line,) = [line for line in ran.printed.splitlines() if line.startswith("rebuild")]
    program, *arguments = shlex.split(line.removeprefix("rebuild"))
    assert program == "hasten"
    before = created(store)
    assert cli.run([*arguments, *tiny[-2:], "hydra.run.dir=again"]) == 0
    again = type(ran)(code=0, folder=tmp_path / "again", printed="", told="").summary
    assert created(store) == before
    for key in ("overrides", "rebuild", "speedup", "size_ratio"):
        assert again[key] == ran.summary[key]
    assert again["best"]["stages"] == ran.summary["best"]["stages"]


def test_a_notebook_gets_the_same_result(ran: Any, tiny: tuple[str, ...], tmp_path: Path) -> None:
    result = package.run([*tiny, "engine=onnxruntime"], tmp_path / "left")
    assert result.best.evaluation is not None
    as_json = json.loads(json.dumps(result.best.to_dict()["evaluation"]))
    assert as_json == ran.summary["best"]["evaluation"]
    assert (tmp_path / "left" / "summary.json").is_file()


def test_a_dry_run_shows_the_stages_and_leaves_nothing(
    ran: Any, tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", "engine=onnxruntime", "pruning=structured", "dry_run=true", *tiny]) == 0
    printed = capsys.readouterr().out
    for stage in ("data", "teacher", "prune", "export", "compile"):
        assert f"\n{stage} " in printed
    assert ran.summary["best"]["stages"]["teacher"][:12] in printed
    assert "to be built" in printed
    assert not list(tmp_path.iterdir())


def test_rows_that_changed_since_the_last_command_are_new_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(pixel: float) -> str:
        np.savez("rows.npz", inputs=np.full((30, 1, 8, 8), pixel), targets=np.arange(30) % 3)
        assert cli.run(["run", "data=npz", "data.path=rows.npz", "dry_run=true"]) == 0
        return capsys.readouterr().out

    first, second = shown(0.5), shown(0.25)
    assert first != second
    assert shown(0.5) == first


def test_a_recipe_that_fails_ends_with_1_and_says_why(hasten: Any) -> None:
    done = hasten("run", "pruning=structured", "pruning.round_to=8", BY_ITSELF)
    assert done.code == 1
    summary = done.summary
    assert [trial["verdict"] for trial in summary["trials"]] == ["accepted", "failed"]
    assert "pruning.round_to=8" in summary["trials"][1]["reason"]
    assert summary["best"]["number"] == 0
    assert "Traceback" not in done.told


def test_a_baseline_that_fails_ends_with_1_and_one_line(hasten: Any) -> None:
    done = hasten("run", "trainer.lr=1e30")
    assert done.code == 1
    assert len(done.told.strip().splitlines()) == 1
    assert "model.training" in done.told
    assert not (done.folder / "summary.json").exists()


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes: int, hidden: int = 8) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
"""


def test_a_model_and_weights_of_the_users_own_are_served_as_they_are(
    hasten: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_own_net.py").write_text(NET)
    mine = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 10))
    save_file(mine.state_dict(), "trained.safetensors")
    net = ("model=custom", "model.arch._target_=my_own_net.Net", "+model.arch.hidden=6", "data.normalize=false")
    done = hasten("run", *net, "model.checkpoint=trained.safetensors", "model.training.epochs=0", BY_ITSELF)
    assert done.code == 0, done.told
    assert [trial["verdict"] for trial in done.summary["trials"]] == ["accepted"]
    rows = np.random.default_rng(0).normal(size=(7, 1, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        expected = mine(torch.from_numpy(rows)).numpy()
    monkeypatch.syspath_prepend(Path.cwd())
    Path("trained.safetensors").unlink()
    served = package.load(done.folder / "model", trust=["my_own_net"])(rows)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


def test_numbers_are_predicted_from_two_inputs_and_their_errors_held(hasten: Any) -> None:
    generator = np.random.default_rng(0)
    ids, mask = generator.integers(0, 9, (1000, 3)), np.ones((1000, 3), np.int64)
    mask[::2, 1:] = 0
    value = (ids * mask).sum(1) / mask.sum(1) + generator.normal(0, 0.3, 1000)
    np.savez("texts.npz", ids=ids, mask=mask, value=value)
    texts = ("data=npz", "data.path=texts.npz", "data.inputs=[ids,mask]", "data.targets=value", "task=regression")
    small = ("model.arch.width=8", "model.arch.num_heads=2", "model.arch.num_layers=1", "model.arch.feedforward=8")
    transformer = ("model=transformer", "model.arch.vocabulary_size=9", *small)
    done = hasten("run", *texts, *transformer, "engine=onnxruntime", "objective.max_drop=0.2", BY_ITSELF)
    assert done.code == 0, done.told
    certificate = done.summary["certificate"]
    assert (certificate["held"], certificate["metric"], certificate["margin"]) == (True, "squared_error", 0.2)
    assert certificate["drop"] == pytest.approx(0, abs=1e-4)
    assert "% of the baseline" in certificate["statement"]
    assert certificate["metrics"].keys() == {"squared_error", "absolute_error"}

    model = package.load(done.folder / "model")
    assert model.columns == {"ids": (3,), "mask": (3,)}
    given = model(ids, mask)
    assert np.square(given[:, 0] - value).mean() < 0.5 * value.var()
    np.testing.assert_array_equal(model(mask=mask, ids=ids), given)
    hidden = np.where(mask == 0, 7, ids)
    np.testing.assert_allclose(model(hidden, mask), given, rtol=1e-4, atol=1e-5)


def test_without_data_a_model_is_timed_and_nothing_is_claimed(hasten: Any) -> None:
    noise = ("data=noise", "data.shape=[1,8,8]", "task=unlabelled", "model.training.epochs=0")
    done = hasten("run", *noise, "model.arch.num_outputs=3", BY_ITSELF)
    assert done.code == 0, done.told
    summary = done.summary
    assert summary["best"]["evaluation"]["latency_ms"]["p50"]["value"] > 0
    assert not summary["certificate"]["held"]
    assert summary["certificate"]["statement"].startswith("Quality unchecked: there are no rows of real data")
    assert package.load(done.folder / "model")(np.zeros((2, 1, 8, 8))).shape == (2, 3)


@pytest.mark.usefixtures("hydra")
def test_a_recipe_is_measured_on_as_many_threads_as_its_engine_is_given(tiny: tuple[str, ...], store: Path) -> None:
    recipe = Composer.of([*tiny, "engine=onnxruntime", "target.threads=2", "engine.threads=2"]).compose()
    evaluator = Evaluator(
        store=Store(store),
        target=Target(device="cpu", threads=2, batch_size=1, engines=("onnxruntime",)),
        objective=Objective(),
        looks=1,
        seed=0,
    )
    built, evaluation, _ = evaluator.evaluate(recipe, references={}, baseline=None)
    assert read_json(built.compiled.folder / "engine.json")["threads"] == 2
    (measured,) = [
        read_json(file)
        for file in store.glob("latency/*/blocks.json")
        if read_json(file.with_name("stage.json"))["ingredients"]["parents"]["candidate"] == built.compiled.key
    ]
    assert measured["environment"]["OMP_NUM_THREADS"] == "2"
    assert len(measured["cpus"]) == min(2, len(os.sched_getaffinity(0)))
    assert evaluation.latency_ms["p50"].value > 0
