"""What a run leaves in MLflow, read back through MLflow's own client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.core.trial import Result, Trial
from hasten.tracking.mlflow import MlflowTracker

CONFIG = """
name: digits
engine: {_target_: hasten.engines.eager.EagerEngine, threads: 1}
tracking: {uri: "http://me:hunter2@server:5000"}
"""
CURVES = {"teacher": {"loss": [2.0, 1.0, 0.5], "val/accuracy@1": [0.1, 0.6, 0.9]}}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def client(place: Path) -> Any:
    """The store is created once: that takes MLflow seconds."""
    MlflowTracker(uri=f"sqlite:///{place}/deep/mlflow.db", artifacts=f"{place}/artifacts").start(
        "warm-up", "", (), place
    )
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{place}/deep/mlflow.db")


@pytest.fixture
def tracker(place: Path, client: Any) -> MlflowTracker:
    return MlflowTracker(uri=f"sqlite:///{place}/deep/mlflow.db", artifacts=f"{place}/artifacts")


@pytest.fixture
def recorded(
    tracker: MlflowTracker, trials: Sequence[Trial], result: Result, run_folder: Path, request: pytest.FixtureRequest
) -> str:
    """The name of an experiment that holds one whole run."""
    name = request.node.name
    tracker.start(name, CONFIG, ["experiment=digits", "+a@b.c=1", "~callbacks", "x=" + "y" * 9000], run_folder)
    for trial in trials:
        curves = CURVES if trial.number == 1 else {}
        files = {"plots/front.json": run_folder / "summary.json"} if trial.number == 1 else {}
        tracker.record(trial, curves, files)
    tracker.finish(result, run_folder, "FINISHED")
    return name


def runs_of(client: Any, experiment: str) -> dict[str, Any]:
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def artifacts_of(client: Any, run: Any, below: str = "") -> Iterator[str]:
    for file in client.list_artifacts(run.info.run_id, below):
        yield from artifacts_of(client, run, file.path) if file.is_dir else [file.path]


def curve_of(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def test_names_runs_by_what_was_tried_and_what_came_of_it(client: Any, recorded: str) -> None:
    assert set(runs_of(client, recorded)) == {
        f"{recorded}: 1.8x",
        "00 baseline",
        "01 structured pruning 0.5: accepted, 1.8x",
        "01 teacher training",
        "02 static int8: rejected, 1.6x",
        "03 engine openvino: failed",
    }


def test_nests_iterations_below_the_run_and_trainings_below_their_iteration(client: Any, recorded: str) -> None:
    runs = runs_of(client, recorded)
    parent = runs.pop(f"{recorded}: 1.8x")
    training = runs.pop("01 teacher training")
    iteration = runs["01 structured pruning 0.5: accepted, 1.8x"]
    assert "mlflow.parentRunId" not in parent.data.tags
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert training.data.tags["mlflow.parentRunId"] == iteration.info.run_id


def test_an_iteration_holds_its_choices_figures_and_reason(client: Any, recorded: str) -> None:
    run = runs_of(client, recorded)["01 structured pruning 0.5: accepted, 1.8x"]
    assert run.data.params["pruning.sparsity"] == "0.5"
    assert run.data.params["engine"] == "eager"
    assert run.data.params["strategy"] == "structured_pruning"
    assert run.data.metrics["latency_p50_ms"] == 1.65
    assert run.data.metrics["latency_p99_ms_high"] == pytest.approx(1.65 * 1.5 * 1.1)
    assert run.data.metrics["speedup_eager_low"] == pytest.approx(1.8 * 0.9)
    assert run.data.metrics["drop_bound"] == pytest.approx(0.012)
    assert run.data.metrics["expected_gain"] == 2.0
    assert run.data.tags["reason"] == "1.8 times as fast, drop at most 0.4 points"
    assert run.data.tags["verdict"] == "accepted"
    assert run.data.tags["hasten.rebuild"].startswith("hasten run pruning=structured pruning.sparsity=0.5")
    assert "70 % of the time is arithmetic" in run.data.tags["mlflow.note.content"]
    assert "| convolution (9) | 80% |" in run.data.tags["mlflow.note.content"]
    assert set(artifacts_of(client, run)) == {"trial.json", "profile.json", "plots/front.json"}


def test_shows_a_failed_iteration_as_failed_with_as_much_of_its_reason_as_fits(client: Any, recorded: str) -> None:
    run = runs_of(client, recorded)["03 engine openvino: failed"]
    assert run.info.status == "FAILED"
    assert run.data.params["engine"] == "openvino"
    assert run.data.tags["reason"].startswith("EngineError: unsupported operator xxx")
    assert run.data.tags["reason"].endswith("…")
    assert "quality" not in run.data.metrics


def test_shows_how_long_an_iteration_really_took(client: Any, recorded: str) -> None:
    info = runs_of(client, recorded)["00 baseline"].info
    assert 2.0 <= (info.end_time - info.start_time) / 1000 < 10.0


def test_the_parents_curves_go_over_the_iterations(client: Any, recorded: str) -> None:
    parent = runs_of(client, recorded)[f"{recorded}: 1.8x"]
    assert curve_of(client, parent, "trial_latency_p50_ms") == [(0, 3.0), (1, 1.65), (2, 1.9)]
    assert curve_of(client, parent, "best_latency_p50_ms") == [(0, 3.0), (1, 1.65), (2, 1.65), (3, 1.65)]
    assert curve_of(client, parent, "best_speedup_eager") == [(1, 1.8), (2, 1.8), (3, 1.8)]


def test_a_trainings_curves_go_over_the_epochs(client: Any, recorded: str) -> None:
    training = runs_of(client, recorded)["01 teacher training"]
    assert curve_of(client, training, "loss") == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert curve_of(client, training, "val/accuracy_1") == [(0, 0.1), (1, 0.6), (2, 0.9)]


def test_a_training_that_came_from_the_store_is_recorded_once(
    tracker: MlflowTracker, client: Any, trials: Sequence[Trial], tmp_path: Path
) -> None:
    tracker.start("cached", CONFIG, (), tmp_path)
    tracker.record(replace(trials[0], stages={"teacher": "key"}), CURVES, {})
    tracker.record(replace(trials[1], stages={"teacher": "key"}), CURVES, {})
    tracker.record(replace(trials[2], stages={"teacher": "another key"}), CURVES, {})
    trainings = {name for name in runs_of(client, "cached") if name.endswith("training")}
    assert trainings == {"00 teacher training", "02 teacher training"}


def test_the_parent_holds_the_result_and_the_model(client: Any, recorded: str) -> None:
    parent = runs_of(client, recorded)[f"{recorded}: 1.8x"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["speedup_engine"] == 1.1
    assert parent.data.metrics["test_drop_bound"] == 0.012
    assert parent.data.tags["verdict"] == "certified"
    assert "at most 1.2 points" in parent.data.tags["mlflow.note.content"]
    assert {"config.yaml", "summary.json", "report.html"} <= set(artifacts_of(client, parent))
    assert client.get_run(parent.info.run_id).outputs.model_outputs


def test_the_logged_model_is_served_by_mlflow(client: Any, recorded: str) -> None:
    import mlflow

    (output,) = client.get_run(runs_of(client, recorded)[f"{recorded}: 1.8x"].info.run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    model = mlflow.pyfunc.load_model(logged.artifact_location)
    assert model.predict(np.ones((2, 4), np.float32)).tolist() == [[4.0] * 3] * 2
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 4)


def test_takes_overrides_as_they_are_typed(client: Any, recorded: str) -> None:
    params = runs_of(client, recorded)[f"{recorded}: 1.8x"].data.params
    assert params["experiment"] == "digits"
    assert params["a_b.c"] == "1"
    assert params["callbacks"] == "~"
    assert len(params["x"]) == 6000


def test_keeps_passwords_out_of_every_field_and_file(client: Any, recorded: str, place: Path) -> None:
    run = runs_of(client, recorded)["01 structured pruning 0.5: accepted, 1.8x"]
    assert run.data.params["data.path"] == "s3://***@bucket/a"
    assert b"hunter2" not in (place / "deep" / "mlflow.db").read_bytes()
    config = next(place.glob("artifacts/*/artifacts/config.yaml")).read_text()
    assert "hunter2" not in config
    assert "hunter2" not in "".join(path.read_text() for path in place.rglob("trial.json"))


def test_keeps_artefacts_where_the_config_says(client: Any, recorded: str, place: Path) -> None:
    parent = runs_of(client, recorded)[f"{recorded}: 1.8x"]
    assert parent.info.artifact_uri == f"{(place / 'artifacts').as_uri()}/{parent.info.run_id}/artifacts"


def test_a_run_without_a_result_is_closed_all_the_same(
    tracker: MlflowTracker, client: Any, trials: Sequence[Trial], tmp_path: Path
) -> None:
    tracker.start("stopped", CONFIG, (), tmp_path)
    tracker.record(trials[0], {}, {})
    tracker.finish(None, tmp_path, "KILLED")
    assert runs_of(client, "stopped")["stopped"].info.status == "KILLED"


def test_says_so_in_the_name_where_nothing_is_certified(
    tracker: MlflowTracker, client: Any, result: Result, tmp_path: Path
) -> None:
    uncertified = replace(result, certificate=replace(result.certificate, held=False))
    tracker.start("open", CONFIG, (), tmp_path)
    tracker.finish(uncertified, tmp_path, "FINISHED")
    assert set(runs_of(client, "open")) == {"open: 1.8x, not certified"}


def test_closes_the_runs_of_killed_processes_and_no_others(
    tracker: MlflowTracker, client: Any, place: Path, tmp_path: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    tracker.start("abandoned", CONFIG, (), tmp_path)
    [mine] = runs_of(client, "abandoned").values()
    host = mine.data.tags["hasten.process"].rpartition(":")[0]
    experiment = mine.info.experiment_id
    dead = client.create_run(experiment, run_name="dead", tags={"hasten.process": f"{host}:{gone.pid}"})
    remote = client.create_run(experiment, run_name="remote", tags={"hasten.process": f"elsewhere:{gone.pid}"})
    foreign = client.create_run(experiment, run_name="foreign")
    MlflowTracker(uri=tracker.uri, artifacts=tracker.artifacts).start("abandoned", CONFIG, (), tmp_path)
    status = {run.info.run_id: client.get_run(run.info.run_id).info.status for run in (mine, dead, remote, foreign)}
    assert status == {
        mine.info.run_id: "RUNNING",
        dead.info.run_id: "KILLED",
        remote.info.run_id: "RUNNING",
        foreign.info.run_id: "RUNNING",
    }


def test_records_again_in_an_experiment_that_was_deleted(tracker: MlflowTracker, client: Any, tmp_path: Path) -> None:
    tracker.start("deleted", CONFIG, (), tmp_path)
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    tracker.start("deleted", CONFIG, (), tmp_path)
    assert client.get_experiment_by_name("deleted").lifecycle_stage == "active"


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("sqlite:///outputs/mlflow.db", "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"),
        ("sqlite:///my runs/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:///my runs/mlflow.db'"),
        ("http://me:hunter2@server:5000", "http://***@server:5000"),
        ("postgresql://me:p@ss@db/mlflow", "mlflow ui --backend-store-uri 'postgresql://***@db/mlflow'"),
    ],
)
def test_says_how_to_open_it_without_a_password(uri: str, command: str) -> None:
    assert MlflowTracker(uri=uri, artifacts="artifacts").command() == command


@pytest.mark.slow
def test_processes_that_create_the_store_at_once_share_it(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hasten.tracking.mlflow import MlflowTracker\n"
        "tracker = MlflowTracker(uri='sqlite:///new/mlflow.db', artifacts='artifacts')\n"
        "tracker.start('shared', '', ['job=' + sys.argv[1]], Path('run'))\n"
        "tracker.finish(None, Path('run'), 'FINISHED')\n"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", script, str(job)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for job in range(2)
    ]
    messages = [job.communicate(timeout=120)[1] for job in jobs]
    assert messages == ["", ""]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/new/mlflow.db")
    experiment = client.get_experiment_by_name("shared")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.params["job"] for run in runs} == {"0", "1"}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_says_why_a_store_can_not_be_written_and_leaves_nothing(tmp_path: Path) -> None:
    def problem(uri: str) -> str | None:
        return MlflowTracker(uri=uri, artifacts="artifacts").problem()

    (tmp_path / "file").write_text("no database")
    assert problem("sqlite:///new/mlflow.db") is None
    assert "not a database (tracking.uri)" in str(problem("sqlite:///file"))
    assert "file is no folder" in str(problem("sqlite:///file/mlflow.db"))
    assert "http://***@127.0.0.1:9 does not answer" in str(problem("http://me:hunter2@127.0.0.1:9"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
