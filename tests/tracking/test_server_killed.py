"""A tracking server that is killed again and again in the middle of a run has the whole record in the end."""

from __future__ import annotations

import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hasten.core.trial import Trial
from hasten.tracking import connection, mlflow
from hasten.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.drill

EXPERIMENT = (
    "name=drill",
    "model.arch.widths=[8]",
    "model.arch.num_blocks=1",
    "trainer.epochs=3",
    "trainer.batch_size=16",
    "trainer.threads=1",
    "target.engines=[eager,onnxruntime]",
    "planner.max_trials=5",
    "strategy=[engine,static_int8,structured_pruning]",
)
USER = "nobody"
"""Of PostgreSQL where the drill is run by root, whom it refuses."""


class TrackingServer:
    """`mlflow server` on a database; it can be killed and started again."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database),
            *("--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"),
        ]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        deadline = time.monotonic() + 120
        while connection.away(self.uri) and time.monotonic() < deadline:
            time.sleep(0.3)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URI of a database of its own."""
    pytest.importorskip("psycopg2")
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("there is no PostgreSQL on this machine")
    folder = Path(tempfile.mkdtemp(prefix="hasten-postgres-"))
    user = USER if os.geteuid() == 0 else getpass.getuser()
    as_user: dict[str, Any] = {"user": user, "extra_groups": [], "cwd": "/"} if os.geteuid() == 0 else {}
    shutil.chown(folder, user)
    made = ["initdb", "-D", str(folder / "data"), "-U", "hasten", "--auth=trust"]
    subprocess.run(made, check=True, capture_output=True, timeout=120, **as_user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listens = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    server = subprocess.Popen(["postgres", "-D", str(folder / "data"), *listens], stderr=subprocess.DEVNULL, **as_user)
    uri = f"postgresql+psycopg2://hasten@127.0.0.1:{port}/postgres"
    try:
        deadline = time.monotonic() + 60
        while connection.away(uri) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield uri
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        shutil.rmtree(folder)


def recorded_while_killed(server: TrackingServer, folder: Path, seed: int) -> tuple[Path, str, int]:
    """Runs hasten while its server is killed at random and started again; its folder, what it told, and the kills."""
    draw, ended, kills = random.Random(seed), threading.Event(), 0

    def torment() -> None:
        nonlocal kills
        while not ended.wait(draw.uniform(2, 12)):
            server.kill()
            kills += 1
            ended.wait(draw.uniform(0, 6))
            server.start()

    server.start()
    tormentor = threading.Thread(target=torment)
    tormentor.start()
    left = folder / "left"
    command = [sys.executable, "-m", "hasten.cli", *EXPERIMENT, f"tracking.uri={server.uri}", f"hydra.run.dir={left}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    finally:
        ended.set()
        tormentor.join(timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    sync = [sys.executable, "-m", "hasten.cli", "sync", f"tracking.uri={server.uri}"]
    synced = subprocess.run(sync, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    return left, done.stderr, kills


def check_record(uri: str, left: Path) -> None:
    """Everything is there, once."""
    client = connection.connect(uri)
    summary = json.loads((left / "summary.json").read_text())
    experiment = client.get_experiment_by_name("drill")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    mine = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name[:2] for run in mine) == [f"{trial['number']:02d}" for trial in summary["trials"]]
    assert {run.info.status for run in runs if run not in mine} == {"FINISHED"}
    measured = [trial for trial in summary["trials"] if trial["verdict"] != "failed"]
    for trial in summary["trials"]:
        (run,) = [run for run in mine if run.info.run_name.startswith(f"{trial['number']:02d}")]
        assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"trial.json"}
        assert run.info.status == ("FINISHED" if trial in measured else "FAILED")
        if trial not in measured:
            continue
        assert run.data.metrics["latency_p50_ms"] == trial["evaluation"]["latency_ms"]["p50"]["value"]
        assert len(client.get_metric_history(run.info.run_id, "latency_p50_ms")) == 1
    curve = client.get_metric_history(parent.info.run_id, "trial_latency_p50_ms")
    assert sorted(point.step for point in curve) == [trial["number"] for trial in measured]
    trainings = [run for run in runs if run is not parent and run not in mine]
    assert trainings
    assert len({run.info.run_name for run in trainings}) == len(trainings)
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"summary.json", "report.html"}
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "READY"
    assert [each.model_id for each in client.get_run(parent.info.run_id).outputs.model_outputs] == [model.model_id]
    assert not (left / "unlogged").exists()
    assert not (left / "refused.json").exists()


def check_recorded_once(server: TrackingServer, trials: Sequence[Trial], run_folder: Path, notes: Path) -> None:
    """Kills the server in the middle of two records and leaves it away at the end of the run."""
    server.start()
    tracker = MlflowTracker(uri=server.uri, artifacts="", pending=str(notes), register="fast")
    tracker.start("drill", "", ["seed=1"], run_folder)
    for number, trial in enumerate(trials):
        if number in (1, 3):
            killer = threading.Timer(random.Random(number).uniform(0.05, 0.6), server.kill)
            killer.start()
            tracker.record(trial, {"teacher": {"loss": [2.0, 1.0]}}, {})
            killer.join()
        else:
            tracker.record(trial, {}, {})
        if number == 2:
            server.start()
    tracker.finish(None, run_folder, "FINISHED")
    assert (run_folder / "unlogged").exists()
    server.start()
    assert MlflowTracker(uri=server.uri, artifacts="", pending=str(notes)).sync()
    client = connection.connect(server.uri)
    experiment = client.get_experiment_by_name("drill").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    mine = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name[:2] for run in mine) == [f"{trial.number:02d}" for trial in trials]
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED"}
    curve = client.get_metric_history(parent.info.run_id, "trial_latency_p50_ms")
    assert [point.step for point in curve] == [trial.number for trial in trials if trial.evaluation is not None]
    (model,) = client.search_logged_models([experiment])
    assert [each.model_id for each in client.get_run(parent.info.run_id).outputs.model_outputs] == [model.model_id]
    assert len(client.search_model_versions("name = 'fast'")) == 1
    assert not (run_folder / "unlogged").exists()
    assert not (run_folder / "refused.json").exists()


def test_records_are_complete_whenever_a_server_on_sqlite_dies(
    trials: Sequence[Trial], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "RETRY_SECONDS", 0.0)
    server = TrackingServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    try:
        check_recorded_once(server, trials, run_folder, tmp_path / "notes")
    finally:
        server.kill()


def test_records_are_complete_whenever_a_server_on_postgresql_dies(
    trials: Sequence[Trial], run_folder: Path, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "RETRY_SECONDS", 0.0)
    server = TrackingServer(tmp_path, postgres)
    try:
        check_recorded_once(server, trials, run_folder, tmp_path / "notes")
    finally:
        server.kill()


def test_a_whole_run_with_a_server_on_sqlite(tmp_path: Path) -> None:
    server = TrackingServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    try:
        left, told, kills = recorded_while_killed(server, tmp_path, seed=1)
        print(f"{kills} kills\n{told}")
        assert kills
        check_record(server.uri, left)
    finally:
        server.kill()


def test_a_whole_run_with_a_server_on_postgresql(tmp_path: Path, postgres: str) -> None:
    server = TrackingServer(tmp_path, postgres)
    try:
        left, told, kills = recorded_while_killed(server, tmp_path, seed=2)
        print(f"{kills} kills\n{told}")
        assert kills
        check_record(server.uri, left)
    finally:
        server.kill()


def test_a_server_that_hangs_holds_up_no_run_for_long(tmp_path: Path) -> None:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "hasten.cli", "run", *EXPERIMENT, "engine=onnxruntime"]
        start = time.monotonic()
        done = subprocess.run(
            [*command, f"tracking.uri={uri}"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        print(f"{time.monotonic() - start:.0f} s\n{done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is away, the run goes on" in done.stderr
    (entry,) = tmp_path.glob("outputs/*/*/unlogged")
    assert list(entry.glob("*/000000.json"))
