"""MLflow: one parent run per optimisation, one nested run per iteration, one below it per training."""

from __future__ import annotations

import getpass
import json
import logging
import os
import shlex
import socket
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

from filelock import FileLock
from omegaconf import OmegaConf

from hasten.core.files import read_json
from hasten.core.interfaces import Tracker
from hasten.core.trial import Result, TrainingResult, Trial
from hasten.tracking import record
from hasten.tracking.credentials import without_credentials

log = logging.getLogger(__name__)

MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
SQLITE = "sqlite:///"
SECONDS_TO_ANSWER = 5


@dataclass(kw_only=True, eq=False)
class MlflowTracker(Tracker):
    """Writes to a local database or to a server, through a client of its own: MLflow's global run stays the user's.

    Attributes:
        uri: of the tracking store, `sqlite:///file`, another database, or `http(s)://server`.
        artifacts: folder or URI of the artefacts. A server decides that for itself.
    """

    uri: str
    artifacts: str
    _name: str = field(default="", init=False, repr=False)
    _engine: str | None = field(default=None, init=False, repr=False)
    _client: Any = field(default=None, init=False, repr=False)
    _experiment: str = field(default="", init=False, repr=False)
    _parent: str = field(default="", init=False, repr=False)
    _best: Trial | None = field(default=None, init=False, repr=False)
    _trainings: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)

    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None:
        self._name = name
        self._engine = _declared_engine(config_yaml)
        with _one_at_a_time(self.uri):
            self._client = _connect(self.uri)
            self._experiment = self._find_experiment(name)
        self._close_abandoned()
        self._parent = self._create_run(name, {"hasten.process": _process(), "hasten.folder": str(folder)})
        self._log(self._parent, params=record.params(overrides))
        self._client.log_text(self._parent, without_credentials(config_yaml), "config.yaml")

    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None:
        tags = {
            "strategy": trial.strategy,
            "bottleneck": trial.bottleneck,
            "verdict": trial.verdict,
            "reason": trial.reason,
            "hasten.rebuild": without_credentials(trial.rebuild),
            "mlflow.note.content": record.trial_note(trial),
        }
        run = self._create_run(record.trial_name(trial), tags, parent=self._parent, seconds=trial.spent)
        # The baseline is always eager; other recipes name their engine where it is not the experiment's.
        engine = {"engine": "eager" if trial.number == 0 else self._engine} if self._engine is not None else {}
        params = engine | record.params(trial.overrides) | {"strategy": trial.strategy}
        self._log(run, params=params, metrics=record.trial_metrics(trial), step=trial.number)
        for stage, curve in curves.items():
            self._record_training(run, trial, stage, curve)
        self._keep(run, trial, files)
        self._client.set_terminated(run, status="FAILED" if trial.verdict == "failed" else "FINISHED")
        if trial.verdict == "accepted":
            self._best = trial
        self._log(self._parent, metrics=record.curve_points(trial, self._best), step=trial.number)

    def finish(self, result: Result | TrainingResult | None, folder: Path, status: str) -> None:
        if result is not None:
            step = max(trial.number for trial in result.trials)
            self._log(self._parent, metrics=record.result_metrics(result), step=step)
            self._tag(self._parent, "reason", result.stopped)
            self._tag(self._parent, "verdict", record.result_verdict(result))
            self._tag(self._parent, "hasten.rebuild", without_credentials(result.best.rebuild))
            self._tag(self._parent, "mlflow.note.content", record.result_note(result))
            self._client.update_run(self._parent, name=record.result_name(self._name, result))
        for name in ("summary.json", "report.html", "layouts.json"):
            if (folder / name).is_file():
                self._client.log_artifact(self._parent, str(folder / name))
        if (folder / "model").is_dir():
            self._log_model(folder / "model")
        self._client.set_terminated(self._parent, status=status)

    def _log_model(self, folder: Path) -> None:
        """The deployed folder as a model that `mlflow models serve` serves. It stays data: graphs and JSON."""
        import mlflow

        with _as_global(mlflow, self._client.tracking_uri), mlflow.start_run(run_id=self._parent, nested=True):
            mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("served.py")),
                artifacts={"model": str(folder)},
                # MLflow runs code of the model's author anyway; what this run itself has run may be run again.
                model_config={"trust": [*_packages(folder), "native code"]},
                signature=_signature(folder),
                input_example=_example(folder),
                pip_requirements=[f"hasten=={version('hasten')}"],
            )

    def command(self) -> str | None:
        shown = without_credentials(self.uri)
        return shown if _is_server(self.uri) else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"

    def problem(self) -> str | None:
        """Why the store can't be written; None where it can. Other databases than sqlite are only tried by a run."""
        shown = without_credentials(self.uri)
        if _is_server(self.uri):
            reason = _unreachable(self.uri) if self.uri.startswith("http") else None
            return f"{shown} does not answer: {reason} (tracking.uri)" if reason else None
        if self.uri.startswith(SQLITE):
            reason = _unwritable(Path(_absolute(self.uri).removeprefix(SQLITE)))
            return f"{shown} can't be written: {reason} (tracking.uri)" if reason else None
        return None

    def _find_experiment(self, name: str) -> str:
        """Its id; created where it is missing, brought back where somebody deleted it in the UI."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            place = None if _is_server(self.uri) else _as_uri(self.artifacts)
            try:
                return str(self._client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                # A job on another machine was faster; no lock of ours covers a server.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            log.warning("the MLflow experiment %s had been deleted and is restored, to record this run in it", name)
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _close_abandoned(self) -> None:
        """Marks runs whose process was killed on this machine, which the UI would show as running for ever."""
        for run in self._client.search_runs([self._experiment], filter_string="attributes.status = 'RUNNING'"):
            host, _, pid = run.data.tags.get("hasten.process", "").rpartition(":")
            if host == socket.gethostname() and not _is_alive(int(pid)):
                self._client.set_terminated(run.info.run_id, status="KILLED")

    def _create_run(self, name: str, tags: Mapping[str, str], *, parent: str = "", seconds: float = 0.0) -> str:
        """The id of a new run that began so many seconds ago: the UI then shows how long it took."""
        reserved = {"mlflow.user": _user(), "mlflow.source.name": "hasten", "mlflow.source.type": "LOCAL"}
        if parent:
            reserved["mlflow.parentRunId"] = parent
        run = self._client.create_run(
            self._experiment,
            start_time=_now_ms() - int(seconds * 1000),
            run_name=name,
            tags={key: record.value(value) for key, value in (reserved | dict(tags)).items()},
        )
        return str(run.info.run_id)

    def _tag(self, run: str, name: str, value: str) -> None:
        self._client.set_tag(run, name, record.value(value))

    def _log(
        self,
        run: str,
        *,
        params: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
    ) -> None:
        """Parameters, and metrics of one step, in as few calls as the store allows."""
        from mlflow.entities import Metric, Param

        now = _now_ms()
        entities = [Param(name, value) for name, value in (params or {}).items()]
        for first in range(0, len(entities), MAX_PARAMS_PER_CALL):
            self._client.log_batch(run, params=entities[first : first + MAX_PARAMS_PER_CALL])
        if metrics:
            self._client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def _record_training(self, iteration: str, trial: Trial, stage: str, curve: Mapping[str, Sequence[float]]) -> None:
        """Once for each training: iterations that took the same stage from the store don't repeat it."""
        from mlflow.entities import Metric

        training = (stage, trial.stages.get(stage, f"of trial {trial.number}"))
        if training in self._trainings:
            return
        self._trainings.add(training)
        now = _now_ms()
        run = self._create_run(f"{trial.number:02d} {stage} training", {"stage": stage}, parent=iteration)
        points = [
            Metric(record.key(quantity), float(value), now, epoch)
            for quantity, values in curve.items()
            for epoch, value in enumerate(values)
        ]
        for first in range(0, len(points), MAX_METRICS_PER_CALL):
            self._client.log_batch(run, metrics=points[first : first + MAX_METRICS_PER_CALL])
        self._client.set_terminated(run)

    def _keep(self, run: str, trial: Trial, files: Mapping[str, Path]) -> None:
        contents = {"trial.json": trial.to_dict()}
        if trial.profile is not None:
            contents["profile.json"] = trial.profile.to_dict()
        for name, content in contents.items():
            self._client.log_text(run, without_credentials(json.dumps(content, indent=1)), name)
        with tempfile.TemporaryDirectory() as scratch:
            for name, path in files.items():
                link = Path(scratch, name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())  # the client names a file after its path, and copies nothing twice
            if files:
                self._client.log_artifacts(run, scratch)


def _connect(uri: str) -> Any:
    """A client on the store, which is created and migrated where it is new (seconds, once).

    Telemetry is off because its thread would talk to the network while latencies are measured, and a server that does
    not answer is given up after seconds instead of minutes; both unless the user's environment says otherwise.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        # MLflow 3.17 on SQLAlchemy 2.1: "The ``noload`` loader strategy is deprecated".
        warnings.filterwarnings("ignore", message=".*noload.*")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It prints a traceback of each database error, beside raising it.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=_absolute(uri))


def _signature(folder: Path) -> Any:
    """Of a deployed folder, in MLflow's terms."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    described = read_json(folder / "model.json")
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, *described["signature"]["output_shape"]))])
    columns = described["preprocessing"]["columns"]
    if any(isinstance(shape, str) for shape in columns.values()):
        kinds = {"text": "string", "bytes": "binary"}
        specs = [ColSpec(kinds[shape], name) for name, shape in columns.items() if isinstance(shape, str)]
        return ModelSignature(Schema(specs), outputs) if len(specs) == len(columns) else None
    types = {each["name"]: each["dtype"] for each in described["signature"]["inputs"]}
    tensors = [
        # A single input goes in without its name.
        TensorSpec(np.dtype(types.get(name, "float32")), (-1, *shape), name if len(columns) > 1 else None)
        for name, shape in columns.items()
    ]
    return ModelSignature(Schema(tensors), outputs)


def _packages(folder: Path) -> list[str]:
    """Top-level packages of the code that the deployed folder names."""
    described = read_json(folder / "model.json")
    named = [described["engine"]["_target_"], *(node["_target_"] for node in described["preprocessing"]["transforms"])]
    if (folder / "module.json").is_file():
        named.append(read_json(folder / "module.json")["arch"]["_target_"])
    return sorted({str(target).partition(".")[0] for target in named} - {"hasten"})


def _example(folder: Path) -> Any:
    """One row of zeros, as it goes into the deployed model; None where texts or bytes go in."""
    import numpy as np

    described = read_json(folder / "model.json")
    columns = described["preprocessing"]["columns"]
    if any(isinstance(shape, str) for shape in columns.values()):
        return None
    types = {each["name"]: each["dtype"] for each in described["signature"]["inputs"]}
    rows = {name: np.zeros((1, *shape), types.get(name, "float32")) for name, shape in columns.items()}
    return rows if len(rows) > 1 else next(iter(rows.values()))


@contextmanager
def _as_global(mlflow: Any, uri: str) -> Iterator[None]:
    """Models are logged through MLflow's global store only; afterwards it is the user's again."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings():
            # It takes type hints for a schema and complains of its own; the logged signature is what checks the rows.
            warnings.filterwarnings("ignore", message="(?s).*[Tt]ype hint.*", category=UserWarning)
            # It wants an example even where texts or encoded images go in, of which there is no neutral one.
            warnings.filterwarnings("ignore", message="(?s).*input example was not provided.*", category=UserWarning)
            yield
    finally:
        mlflow.set_tracking_uri(before)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Lets one process at a time create and migrate a local database: two at once leave it broken."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(_absolute(uri).removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=120):
        yield


def _absolute(uri: str) -> str:
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute()) if uri.startswith(SQLITE) else uri


def _as_uri(folder: str) -> str:
    return folder if "://" in folder else Path(folder).absolute().as_uri()


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _unreachable(uri: str) -> str | None:
    """Why a tracking server gives no sign of health; None if it does."""
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER):
            return None
    except (OSError, ValueError, HTTPException) as error:
        return without_credentials(str(error))


def _unwritable(database: Path) -> str | None:
    """Why a sqlite file can't be written, or made where there is none; None if it can. Leaves nothing behind."""
    if not database.exists():
        above = next(folder for folder in database.parents if folder.exists())
        return None if above.is_dir() and os.access(above, os.W_OK) else f"{above} is no folder that may be written to"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=5)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master")
            connection.rollback()
    except sqlite3.Error as error:
        return str(error)
    return None if os.access(database, os.W_OK) else "it may not be written to"


def _declared_engine(config_yaml: str) -> str | None:
    """`eager` of `_target_: hasten.engines.eager.EagerEngine`: recipes only name the engine where they change it."""
    target = OmegaConf.select(OmegaConf.create(config_yaml), "engine._target_")
    return str(target).split(".")[-2] if target else None


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that runs under a number without a name
        return str(os.getuid())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
