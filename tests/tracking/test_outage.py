"""Whatever call of the tracking server fails, and how: in the end the record is that of an undisturbed run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.core.trial import Result, Trial
from hasten.tracking import connection, logged_model, mlflow
from hasten.tracking.mlflow import MlflowTracker
from hasten.tracking.system import Meter

CURVES = {"teacher": {"loss": [2.0, 1.0, 0.5]}}


@dataclass
class Server:
    """MLflow's store as its client shows it, in memory; calls with these numbers fail, before or after they did it."""

    fails: Callable[[int], str] = lambda number: ""
    tracking_uri: str = "http://server"
    calls: int = 0
    experiments: list[str] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, SimpleNamespace] = field(default_factory=dict)
    registered: dict[str, list[Any]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = object.__getattribute__(self, f"do_{name}")

        def called(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            how = self.fails(self.calls)
            if how == "before":
                raise ConnectionError("http://me:hunter2@server is away")
            answer = method(*arguments, **named)
            if how == "after":
                raise ConnectionError("the answer got lost")
            if how == "refuse":
                raise ValueError("no")
            return answer

        return called

    def do_get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name, lifecycle_stage="active") if name in self.experiments else None

    def do_create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.experiments.append(name)
        return name

    def do_search_runs(self, experiments: Sequence[str], filter_string: str, max_results: int = 0) -> list[Any]:
        key = filter_string.partition("= '")[2].rstrip("'")
        return [self.do_get_run(run) for run, it in self.runs.items() if it["tags"].get("hasten.key") == key]

    def do_get_run(self, run: str) -> Any:
        it = self.runs[run]
        models = [SimpleNamespace(model_id=model) for model in it["outputs"]]
        data = SimpleNamespace(params=it["params"], tags=it["tags"])
        outputs = SimpleNamespace(model_outputs=models) if models else None
        return SimpleNamespace(info=SimpleNamespace(run_id=run), data=data, outputs=outputs)

    def do_create_run(self, experiment: str, start_time: int, run_name: str, tags: dict[str, str]) -> Any:
        run = f"id{len(self.runs)}"
        empty = {"params": {}, "points": set(), "files": {}, "outputs": [], "used": set(), "status": "RUNNING"}
        self.runs[run] = {"name": run_name, "tags": dict(tags), **empty}
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def do_log_batch(self, run: str, params: Any = (), metrics: Any = (), tags: Any = ()) -> None:
        self.runs[run]["params"] |= {each.key: each.value for each in params}
        self.runs[run]["points"] |= {(each.key, each.value, each.timestamp, each.step) for each in metrics}
        self.runs[run]["tags"] |= {each.key: each.value for each in tags}

    def do_log_text(self, run: str, text: str, file: str) -> None:
        self.runs[run]["files"][file] = text

    def do_log_artifacts(self, run: str, folder: str) -> None:
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        self.runs[run]["files"] |= {str(path.relative_to(folder)): path.read_text() for path in files}

    def do_log_inputs(self, run: str, used: Sequence[Any]) -> None:
        self.runs[run]["used"] |= {each.dataset.name for each in used}

    def do_update_run(self, run: str, name: str) -> None:
        self.runs[run]["name"] = name

    def do_set_terminated(self, run: str, status: str, end_time: int = 0) -> None:
        self.runs[run]["status"] = status

    def do_search_logged_models(self, experiments: Sequence[str], filter_string: str) -> list[Any]:
        return [model for model in self.models.values() if f"'{model.source_run_id}'" in filter_string]

    def do_create_logged_model(self, experiment: str, name: str, source_run_id: str, params: dict[str, str]) -> Any:
        from mlflow.entities import LoggedModelStatus

        model = SimpleNamespace(
            model_id=f"m{len(self.models)}",
            name=name,
            source_run_id=source_run_id,
            params=params,
            status=LoggedModelStatus.PENDING,
            files={},
        )
        self.models[model.model_id] = model
        return model

    def do_log_outputs(self, run: str, models: Sequence[Any]) -> None:
        self.runs[run]["outputs"] += [model.model_id for model in models]

    def do_log_model_artifacts(self, model: str, folder: str) -> None:
        self.models[model].files = {path.name: path.read_text() for path in Path(folder).iterdir()}

    def do_finalize_logged_model(self, model: str, status: Any) -> None:
        self.models[model].status = status

    def do_create_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS

        if name in self.registered:
            raise MlflowException("it is there", RESOURCE_ALREADY_EXISTS)
        self.registered[name] = []

    def do_search_model_versions(self, filter_string: str) -> list[Any]:
        return [each for name, found in self.registered.items() for each in found if f"'{name}'" in filter_string]

    def do_create_model_version(self, name: str, source: str, run_id: str, tags: Any, model_id: str) -> None:
        self.registered[name].append((source, run_id, tags, model_id))

    @property
    def shown(self) -> Any:
        """All that people would see, without times and random keys."""
        names = {it["tags"]["hasten.key"]: it["name"] for it in self.runs.values()}
        runs = [
            (
                it["name"],
                {key: value for key, value in it["tags"].items() if key not in ("hasten.key", "mlflow.parentRunId")},
                names.get(it["tags"]["hasten.key"].rpartition("/")[0]),
                it["params"],
                sorted((name, value, step) for name, value, _, step in it["points"]),
                it["files"],
                it["outputs"],
                sorted(it["used"]),
                it["status"],
            )
            for it in self.runs.values()
        ]
        models = [(it.name, it.source_run_id, it.files, it.status) for it in self.models.values()]
        return self.experiments, runs, models, self.registered


Recorded = Callable[[Callable[[int], str]], Server]


@pytest.fixture
def recorded(
    tmp_path: Path, trials: Sequence[Trial], result: Result, monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> Recorded:
    """Records one run on a server whose calls fail so, and afterwards what was left, on one that is well."""
    counter = itertools.count()
    data = {
        "name": "digits",
        "fingerprint": "a" * 64,
        "rows": {"train": 9, "test": 3},
        "inputs": {"input": "float32 [4]"},
    }
    (run_folder / "data.json").write_text(json.dumps(data))
    monkeypatch.setattr(Meter, "read", lambda self: {"system/cpu_utilization_percentage": 50.0})

    def saved(folder: Path, path: Path, run: str, model: Any) -> Path:
        path.mkdir()
        (path / "MLmodel").write_text(f"{run} {model.model_id}")
        return path

    def record(fails: Callable[[int], str]) -> Server:
        server = Server(fails=fails)
        monkeypatch.setattr(connection, "connect", lambda uri: server)
        notes = tmp_path / f"notes{next(counter)}"
        tracker = MlflowTracker(uri="http://me:hunter2@server", artifacts="", pending=str(notes), register="fast")
        tracker.start("digits", "engine: {_target_: hasten.engines.eager.EagerEngine}", ["seed=1"], run_folder)
        for trial in trials[:2]:
            tracker.record(trial, CURVES if trial.number == 1 else {}, {"report.html": run_folder / "report.html"})
        tracker.finish(result, run_folder, "FINISHED")
        server.fails = lambda number: ""
        MlflowTracker(uri="http://me:hunter2@server", artifacts="", pending=str(notes)).sync()
        assert list(notes.glob("*")) == []
        assert not (run_folder / "unlogged").exists()
        return server

    monkeypatch.setattr(mlflow, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(connection, "away", lambda uri: None)
    monkeypatch.setattr(logged_model, "save", saved)
    return record


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_call_that_fails_once_leaves_the_record_as_it_would_have_been(recorded: Recorded, how: str) -> None:
    undisturbed = recorded(lambda number: "")
    assert len(undisturbed.runs) == 4
    assert undisturbed.calls > 30
    assert len(undisturbed.registered["fast"]) == 1
    for failing in range(1, undisturbed.calls + 1):
        server = recorded(lambda number, failing=failing: how if number == failing else "")  # type: ignore[misc]
        assert server.shown == undisturbed.shown, f"call {failing}"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["", "before", "after"]), max_size=60))
def test_any_calls_may_fail_in_any_way(recorded: Recorded, fate: list[str]) -> None:
    server = recorded(lambda number: fate[number - 1] if number <= len(fate) else "")
    assert server.shown == recorded(lambda number: "").shown


def test_a_server_that_is_never_there_leaves_all_of_it_for_later(recorded: Recorded) -> None:
    undisturbed = recorded(lambda number: "")
    server = recorded(lambda number: "before")
    assert server.shown == undisturbed.shown


def test_says_once_that_it_is_away_and_at_the_end_how_it_is_logged_later(
    trials: Sequence[Trial], result: Result, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracker = MlflowTracker(uri="http://me:hunter2@127.0.0.1:9", artifacts="")
    tracker.start("digits", "", (), run_folder)
    for trial in trials:
        tracker.record(trial, {}, {})
    assert tracker.command() is None
    tracker.finish(result, run_folder, "FINISHED")
    first, last = (entry.getMessage() for entry in caplog.records)
    assert first.startswith("tracking: http://***@127.0.0.1:9 is away, the run goes on and is logged when it is back: ")
    assert first.endswith("Connection refused")
    assert "7 records of this run in" in last
    assert "`hasten sync`" in last
    assert "hunter2" not in "".join(path.read_text() for path in run_folder.rglob("unlogged/**/*.json"))


def test_a_run_that_was_killed_is_logged_by_the_next_one_and_no_living_run_is(
    trials: Sequence[Trial], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setattr(connection, "connect", lambda uri: server)
    killed, living, late = (
        MlflowTracker(uri="http://server", artifacts="", pending=str(tmp_path / "notes")) for _ in range(3)
    )
    monkeypatch.setattr(connection, "away", lambda uri: "gone")
    for tracker in (killed, living):
        tracker.start("digits", "", (), run_folder)
        tracker.record(trials[0], {}, {})
    killed._journal._lock.release()  # type: ignore[union-attr]  # as its death does
    monkeypatch.setattr(connection, "away", lambda uri: None)
    late.start("digits", "", (), tmp_path)
    assert sorted(it["name"] for it in server.runs.values()) == ["00 baseline", "digits", "digits"]
    monkeypatch.setattr(mlflow, "RETRY_SECONDS", 0.0)
    living.record(trials[1], {}, {})
    assert len(server.runs) == 6


def test_what_the_store_refuses_is_kept_beside_the_record_and_holds_nothing_up(
    trials: Sequence[Trial], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setattr(connection, "connect", lambda uri: server)
    monkeypatch.setattr(connection, "away", lambda uri: None)
    tracker = MlflowTracker(uri="http://server", artifacts="", pending=str(tmp_path / "notes"))
    tracker.start("digits", "", (), run_folder)
    server.fails = lambda number: "refuse"
    tracker.record(trials[0], {}, {})
    server.fails = lambda number: ""
    tracker.record(trials[1], {}, {})
    tracker.finish(None, run_folder, "FINISHED")
    assert {it["status"] for it in server.runs.values()} >= {"FINISHED"}
    assert '"reason": "no"' in (run_folder / "refused.json").read_text()
