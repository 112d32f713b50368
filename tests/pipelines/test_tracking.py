"""What one run leaves in MLflow, and what can be made of it afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from omegaconf import OmegaConf

from hasten import cli
from hasten.core.trial import Interval
from hasten.reporting.units import ratio_interval

SECRET = "hunter2-and-more"
TOKEN = "tok-5f2a77c1"


@pytest.fixture(scope="module")
def recorded(hasten: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`hasten run engine=onnxruntime`, with its record in a place of its own."""
    place = tmp_path_factory.mktemp("record")
    uri = f"sqlite:///{place}/mlflow.db"
    typed = (
        "tracking=mlflow",
        f"tracking.uri={uri}",
        f"tracking.artifacts={place}/artifacts",
        f"tracking.pending={place}/pending",
        "tracking.register=fast",
        "name=digits",
    )
    before = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = SECRET
    try:
        said = f"+model.checkpoint_keys.a='https://me:{SECRET}@host/a?token={TOKEN}'"
        done = hasten("run", "engine=onnxruntime", *typed, said)
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert done.code == 0, done.told
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return SimpleNamespace(
        done=done, place=place, uri=uri, typed=typed, client=client, runs=runs, parent=parent, experiment=experiment
    )


def below(recorded: Any, run: Any) -> list[Any]:
    found = [it for it in recorded.runs if it.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    return sorted(found, key=lambda it: it.info.run_name)


@pytest.mark.slow
def test_a_run_is_a_parent_with_nested_iterations_and_their_trainings(recorded: Any) -> None:
    client, done, parent = recorded.client, recorded.done, recorded.parent
    assert f"mlflow ui --backend-store-uri {recorded.uri}" in done.printed
    iterations = below(recorded, parent)
    assert [run.info.run_name[:2] for run in iterations] == ["00", "01"]
    assert {run.info.status for run in recorded.runs} == {"FINISHED"}

    summary = done.summary
    assert parent.data.metrics["speedup_eager"] == summary["speedup"]["eager"]["value"]
    assert parent.data.metrics["certified"] == 1.0
    curve = client.get_metric_history(parent.info.run_id, "trial_latency_p50_ms")
    assert {point.step: point.value for point in curve} == {
        trial["number"]: trial["evaluation"]["latency_ms"]["p50"]["value"] for trial in summary["trials"]
    }
    given = iterations[1]
    assert given.data.metrics["quality"] == summary["best"]["evaluation"]["quality"]
    assert given.data.tags["verdict"] == "accepted"

    (training,) = below(recorded, iterations[0])
    assert [point.step for point in client.get_metric_history(training.info.run_id, "train_loss")] == [0, 1, 2]

    left = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"summary.json", "report.html", "config.yaml", "plots"} <= left
    (logged,) = client.search_logged_models([recorded.experiment.experiment_id])
    assert logged.source_run_id == parent.info.run_id
    (copy,) = (recorded.place / "artifacts" / "models" / logged.model_id).rglob("model.json")
    assert copy.read_bytes() == (done.folder / "model" / "model.json").read_bytes()


@pytest.mark.slow
def test_iterations_can_be_compared_by_every_choice_that_matters(recorded: Any) -> None:
    baseline, given = below(recorded, recorded.parent)
    wanted = {"student": "same", "distillation": "none", "pruning": "none", "quantization": "none"}
    for run, engine in ((baseline, "eager"), (given, "onnxruntime")):
        assert {**wanted, "pruning.sparsity": "none", "engine": engine}.items() <= run.data.params.items()
        assert run.data.tags["hasten.kind"] == "iteration"
    assert recorded.parent.data.tags["hasten.kind"] == "run"


@pytest.mark.slow
def test_the_rows_the_machine_and_the_registered_model_are_recorded_as_mlflow_has_them(recorded: Any) -> None:
    used = {
        each.tags[0].value: (each.dataset.name, json.loads(each.dataset.profile)["num_rows"])
        for each in recorded.client.get_run(recorded.parent.info.run_id).inputs.dataset_inputs
    }
    assert {part: name for part, (name, _) in used.items()} == {
        part: f"digits {part}" for part in ("train", "validate", "test")
    }
    assert sum(rows for _, rows in used.values()) == 1797
    (version,) = recorded.client.search_model_versions("name = 'fast'")
    assert version.run_id == recorded.parent.info.run_id
    assert version.tags["verdict"] == "certified"
    if Path("/proc/stat").is_file():
        assert 0 <= recorded.parent.data.metrics["system/cpu_utilization_percentage"] <= 100


@pytest.mark.slow
def test_no_password_and_no_token_is_anywhere(recorded: Any) -> None:
    done = recorded.done
    texts = {"printed": done.printed.encode(), "told": done.told.encode()}
    for folder in (done.folder, recorded.place):
        texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(texts) > 20
    for secret in (SECRET, TOKEN):
        assert [name for name, text in texts.items() if secret.encode() in text] == []
    assert b"https://***@host/a?token=***" in (done.folder / "config.yaml").read_bytes()


@pytest.mark.slow
def test_a_report_is_made_again_from_mlflow_alone(recorded: Any, tmp_path: Path) -> None:
    (recorded.done.folder / "report.html").rename(tmp_path / "as it was.html")
    as_it_was = (tmp_path / "as it was.html").read_text()
    (iteration, *_) = below(recorded, recorded.parent)
    for number, wanted in enumerate((recorded.parent.info.run_id[:8], "digits", iteration.info.run_id)):
        left = tmp_path / str(number)
        assert cli.run(["report", f"run={wanted}", *recorded.typed, f"hydra.run.dir={left}"]) == 0
        assert (left / "report.html").read_text() == as_it_was


@contextmanager
def measured_for_another_target(recorded: Any) -> Iterator[None]:
    """In a store that has each pair for other requests, too, for which the other of the two is the faster."""
    latency = Path(OmegaConf.load(recorded.done.folder / "config.yaml").store.folder) / "latency"
    copies = []
    for entry in sorted(latency.iterdir()):
        copies.append(latency / f"copy-{entry.name}")
        shutil.copytree(entry, copies[-1])
        manifest = json.loads((copies[-1] / "stage.json").read_text())
        parents = manifest["ingredients"]["parents"]
        parents["reference"], parents["candidate"] = parents["candidate"], parents["reference"]
        manifest["ingredients"]["config"]["batch_size"] = 7
        (copies[-1] / "stage.json").write_text(json.dumps(manifest))
    try:
        yield
    finally:
        for copy in copies:
            shutil.rmtree(copy)


@pytest.mark.slow
def test_two_runs_are_put_side_by_side(recorded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, given = (run.info.run_id for run in below(recorded, recorded.parent))
    with measured_for_another_target(recorded):
        where = f"hydra.run.dir={tmp_path}/left"
        assert cli.run(["compare", f"runs=[{baseline},{given}]", *recorded.typed, where]) == 0
    printed = capsys.readouterr().out
    ratio = Interval(**recorded.done.summary["speedup"]["eager"])
    # On a busy machine the interval may be too wide to tell.
    verdict = "The second is surely faster" if ratio.low > 1 else "No difference in speed can be told"
    assert re.search(r"engine\W+eager\W+onnxruntime", printed)
    assert f"{verdict}: {ratio_interval(ratio)}" in printed
    assert "Paired: they were measured in turns, block beside block, in one session." in printed
    page = (tmp_path / "left" / "compare.html").read_text()
    assert verdict in page
    assert "<svg" in page
    folder = recorded.done.folder
    assert cli.run(["compare", f"runs=[{folder},{given}]", *recorded.typed, f"hydra.run.dir={tmp_path}/same"]) == 0
    assert "one and the same artefact" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("report",), "run has no value and needs one"),
        (("report", "run=nothing"), "run=nothing is no run in sqlite:///"),
        (("compare",), "runs must name two runs, got 0"),
        (("compare", "runs=[a]"), "runs must name two runs, got 1"),
        (("compare", "runs=[x,y]"), "runs=x is no run in sqlite:///"),
        (("sync", "runs=[there-is-none]"), "there-is-none is no folder of a run"),
        (("ui", "ui.host=203.0.113.7"), "203.0.113.7:5000 can't be listened at"),
        (("ui", "ui.port=99999"), "99999"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    recorded: Any, typed: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*typed, *recorded.typed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hasten: ")
    assert told in line


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["ui", "report", "compare", "sync"])
def test_needs_a_record_in_mlflow(pipeline: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = {"report": ("run=a",), "compare": ("runs=[a,b]",)}.get(pipeline, ())
    assert cli.run([pipeline, *typed, "tracking=none"]) == 2
    assert f"hasten {pipeline} needs a record in MLflow (tracking=mlflow)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_record_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ui", f"tracking.uri=sqlite:///{tmp_path}/none.db"]) == 2
    assert "none.db is not there yet: no run has been recorded (tracking.uri)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ui_opens_and_ends_with_ctrl_c(recorded: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hasten.cli", "ui", f"tracking.uri={recorded.uri}", "ui.port=0"]
    opened = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert opened.stdout is not None
        line = opened.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+(?=/#/experiments\?workflowType=machine_learning )", line)
        assert address, line + (opened.communicate(timeout=60)[1] if not line else "")
        with urlopen(f"{address[0]}/", timeout=30) as page:
            assert b"MLflow" in page.read()
        opened.send_signal(signal.SIGINT)
        printed, told = opened.communicate(timeout=60)
    finally:
        opened.kill()
        opened.wait(timeout=30)
    assert (opened.returncode, printed, told) == (0, "ended\n", "")
