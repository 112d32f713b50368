"""What one run leaves in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_run_is_a_parent_with_nested_iterations_and_their_trainings(hasten: Any, ran: Any, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow = ("tracking=mlflow", f"tracking.uri={uri}", f"tracking.artifacts={tmp_path}/artifacts", "name=digits")
    done = hasten("run", "engine=onnxruntime", *mlflow)
    assert done.code == 0, done.told
    assert f"mlflow ui --backend-store-uri {uri}" in done.printed

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    (parent,) = [run for run in runs if parents[run.info.run_id] is None]
    iterations = sorted(
        (run for run in runs if parents[run.info.run_id] == parent.info.run_id), key=lambda run: run.info.run_name
    )
    assert [run.info.run_name[:2] for run in iterations] == ["00", "01"]
    assert {run.info.status for run in runs} == {"FINISHED"}

    summary = done.summary
    assert parent.data.metrics["speedup_eager"] == summary["speedup"]["eager"]["value"]
    assert parent.data.metrics["certified"] == 1.0
    curve = client.get_metric_history(parent.info.run_id, "trial_latency_p50_ms")
    assert {point.step: point.value for point in curve} == {
        trial["number"]: trial["evaluation"]["latency_ms"]["p50"]["value"] for trial in summary["trials"]
    }
    given = iterations[1]
    assert given.data.params["engine"] == "onnxruntime"
    assert given.data.metrics["quality"] == summary["best"]["evaluation"]["quality"]
    assert given.data.tags["verdict"] == "accepted"

    (training,) = [run for run in runs if parents[run.info.run_id] == iterations[0].info.run_id]
    assert [point.step for point in client.get_metric_history(training.info.run_id, "train_loss")] == [0, 1, 2]

    left = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"summary.json", "report.html", "config.yaml"} <= left
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert logged.source_run_id == parent.info.run_id
    (copy,) = (tmp_path / "artifacts" / "models" / logged.model_id).rglob("model.json")
    assert copy.read_bytes() == (done.folder / "model" / "model.json").read_bytes()
