"""MLflow: one parent run per optimisation, one nested run per iteration, one below it per training."""

from __future__ import annotations

import getpass
import json
import logging
import os
import shlex
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hasten.core.credentials import without_credentials
from hasten.core.errors import HastenError
from hasten.core.files import read_json
from hasten.core.interfaces import Tracker
from hasten.core.trial import DATA, Result, TrainingResult, Trial
from hasten.tracking import connection, record
from hasten.tracking.journal import Facts, Journal, below, left
from hasten.tracking.operations import (
    Create,
    Desk,
    End,
    KeepFiles,
    KeepModel,
    KeepText,
    Log,
    Operation,
    Rename,
    Use,
)
from hasten.tracking.system import Meter

log = logging.getLogger(__name__)

KEPT = ("summary.json", "report.html", "layouts.json", "placement.json", "placement.svg", "plots")
"""Of a run's folder, beside the model."""
SWEEP_VARIABLE = "HASTEN_SWEEP"
"""Environment variable that names the sweep which a run belongs to."""
RETRY_SECONDS = 20.0
"""After a store was found to be away, until it is tried again: looking for it costs seconds."""


@dataclass(kw_only=True, eq=False)
class MlflowTracker(Tracker):
    """Writes to a local database or to a server, through a client of its own: MLflow's global run stays the user's.

    What is recorded is first written into the run's folder and then sent. While the store is away it stays there; it is
    sent by a later record, at the end of the run, by the next run with the same store, or by `hasten sync`.

    Attributes:
        uri: of the tracking store, `sqlite:///file`, another database, or `http(s)://server`.
        artifacts: folder or URI of the artefacts. A server decides that for itself.
        pending: folder in which runs are noted that have something to be sent.
        register: name under which the model of a run becomes a version in MLflow's registry; None: it does not.
    """

    uri: str
    artifacts: str
    pending: str = "outputs/pending"
    register: str | None = None
    _name: str = field(default="", init=False, repr=False)
    _folder: Path = field(default_factory=Path, init=False, repr=False)
    _meter: Meter | None = field(default=None, init=False, repr=False)
    _client: Any = field(default=None, init=False, repr=False)
    _desk: Desk | None = field(default=None, init=False, repr=False)
    _journal: Journal | None = field(default=None, init=False, repr=False)
    _parent: str = field(default="", init=False, repr=False)
    _best: Trial | None = field(default=None, init=False, repr=False)
    _trainings: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)
    _away: bool = field(default=False, init=False, repr=False)
    _tried: float = field(default=-RETRY_SECONDS, init=False, repr=False)

    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None:
        self._name, self._folder = name, folder
        self._meter = Meter(folder=folder)
        self._parent = uuid.uuid4().hex
        artifacts = None if connection.is_server(self.uri) else _as_uri(self.artifacts)
        facts = Facts(key=self._parent, store=self._store, experiment=name, artifacts=artifacts)
        self._journal = Journal.begin(folder, Path(self.pending), facts)
        self._desk = None
        tags = {
            "hasten.kind": "run",
            "hasten.version": version("hasten"),
            "hasten.process": _process(),
            "hasten.folder": str(folder),
        }
        if sweep := os.environ.get(SWEEP_VARIABLE):
            tags["hasten.sweep"] = sweep
        self._record(
            _create(self._parent, name, tags),
            Log(run=self._parent, params=record.params(overrides)),
            KeepText(run=self._parent, file="config.yaml", text=without_credentials(config_yaml)),
        )

    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None:
        tags = {
            "hasten.kind": "iteration",
            "hasten.holds": str(trial.holds).lower(),
            "strategy": trial.strategy,
            "bottleneck": trial.bottleneck,
            "verdict": trial.verdict,
            "reason": trial.reason,
            "hasten.rebuild": without_credentials(trial.rebuild),
            "mlflow.note.content": record.trial_note(trial),
        }
        run = f"{self._parent}/{trial.number:02d}"
        params = record.params(trial.overrides) | record.choices(trial) | {"strategy": trial.strategy}
        assert self._meter is not None
        system = _points(self._meter.read(), trial.number)
        status = "FAILED" if trial.verdict == "failed" else "FINISHED"
        if trial.verdict == "accepted":
            self._best = trial
        self._record(
            _create(run, record.trial_name(trial), tags, parent=self._parent, seconds=trial.spent),
            Log(run=run, params=params, points=[*_points(record.trial_metrics(trial), trial.number), *system]),
            *self._used(run),
            *(each for stage, curve in curves.items() for each in self._training(run, trial, stage, curve)),
            *_kept(run, trial),
            KeepFiles(run=run, files={name: self._place(path) for name, path in files.items()}),
            End(run=run, status=status, end_ms=_now_ms()),
            Log(run=self._parent, points=[*_points(record.curve_points(trial, self._best), trial.number), *system]),
            *(self._used(self._parent) if trial.number == 0 else ()),
        )

    def finish(self, result: Result | TrainingResult | None, folder: Path, status: str) -> None:
        run = self._parent
        operations: list[Operation] = []
        points: list[tuple[str, float, int, int]] = []
        shown: dict[str, str] = {}
        if result is not None:
            step = max(trial.number for trial in result.trials)
            tags = {
                "reason": result.stopped,
                "verdict": record.result_verdict(result),
                "hasten.rebuild": result.best.rebuild,
                "mlflow.note.content": record.result_note(result),
            }
            shown = {name: record.value(value) for name, value in tags.items()}
            points = _points(record.result_metrics(result), step)
            operations.append(Log(run=run, points=points, tags=shown))
            operations.append(Rename(run=run, name=record.result_name(self._name, result)))
        names = [name for name in KEPT if (folder / name).exists()]
        operations.append(KeepFiles(run=run, files={name: name for name in names}))
        operations.append(End(run=run, status=status, end_ms=_now_ms()))
        assert self._journal is not None
        if (folder / "model").is_dir():
            self._journal.add(operations)
            tags = {name: shown[name] for name in ("verdict", "hasten.rebuild") if name in shown}
            operations = [KeepModel(run=run, folder="model", points=points, register=self.register, tags=tags)]
        self._record(*operations, at_once=True)
        if num_pending := self._journal.num_pending:
            log.warning(
                "tracking: %s is still away; %s of this run in %s will be logged by the next run with this "
                "tracking.uri, or by `hasten sync` with it",
                self.shown,
                _records(num_pending),
                self._journal.folder,
            )
        self._journal.close()

    def command(self) -> str | None:
        if self._journal is not None and self._client is None:
            return None  # there is nothing to look at yet
        server = connection.is_server(self.uri)
        return self.shown if server else f"mlflow ui --backend-store-uri {shlex.quote(self.shown)}"

    def problem(self) -> str | None:
        """Why the store can't be written; None where it can. Other databases than sqlite are only tried by a run."""
        return connection.problem(self.uri)

    def sync(self, folders: Sequence[Path] = ()) -> dict[str, int]:
        """Logs what earlier runs could not, and gives the number of records that each had, by its folder.

        Args:
            folders: of the runs; all that are noted, if none are given.

        Raises:
            HastenError: the store is away.
        """
        try:
            return self._sync(folders)
        except Exception as error:
            raise HastenError(f"{self.shown} is away: {_reason(error)} (tracking.uri)") from error

    @property
    def shown(self) -> str:
        """The URI without what is secret in it."""
        return without_credentials(self.uri)

    def _sync(self, folders: Sequence[Path] = ()) -> dict[str, int]:
        notes = Path(self.pending)
        chosen = (journal for folder in folders for journal in below(folder, notes))
        journals = list(chosen if folders else left(notes, self._store))
        found: dict[str, int] = {}
        experiments = set()
        for journal in journals:
            if not journal.claim():
                continue
            try:
                desk = self._desk_of(journal)
                found[str(journal.run_folder)] = journal.send(desk, connection.is_refusal)
                experiments.add(desk.experiment)
            finally:
                journal.close()
        self._close_abandoned(experiments)
        return found

    @property
    def _store(self) -> str:
        return without_credentials(connection.absolute(self.uri))

    def _record(self, *operations: Operation, at_once: bool = False) -> None:
        """Writes it down, and sends it with whatever waits before it; where the store is away it waits as well.

        Args:
            at_once: however short ago the store was found to be away.
        """
        assert self._journal is not None
        self._journal.add(operations)
        if self._away and not at_once and time.monotonic() - self._tried < RETRY_SECONDS:
            return
        try:
            first = self._desk is None
            self._desk = self._desk or self._desk_of(self._journal)
            self._journal.send(self._desk, connection.is_refusal)
            if first:
                self._catch_up(self._desk.experiment)
        except Exception as error:
            self._tell_away(error)
        else:
            if self._away:
                log.info("tracking: %s is back and has what it missed", self.shown)
            self._away = False

    def _catch_up(self, experiment: str) -> None:
        """What earlier runs have left: records that could not be sent, and runs that the UI shows as running."""
        if found := sum(self._sync().values()):
            log.info("tracking: logged what earlier runs could not (%s)", _records(found))
        self._close_abandoned({experiment})

    def _tell_away(self, error: Exception) -> None:
        level, told = logging.DEBUG if self._away else logging.WARNING, _reason(error)
        log.log(level, "tracking: %s is away, the run goes on and is logged when it is back: %s", self.shown, told)
        self._away, self._tried = True, time.monotonic()
        self._desk = None  # what comes back may be another database

    def _desk_of(self, journal: Journal) -> Desk:
        """Where the records of a run belong.

        Raises:
            Exception: the store is away.
        """
        facts = journal.facts
        if reason := connection.away(self.uri):
            raise ConnectionError(reason)
        with connection.one_at_a_time(self.uri):
            self._client = self._client or connection.connect(self.uri)
            experiment = connection.find_experiment(self._client, facts.experiment, facts.artifacts)
        return Desk(client=self._client, experiment=experiment, folder=journal.run_folder)

    def _place(self, file: Path) -> str:
        """From the run's folder on where it lies in it, so that the folder may be moved while a server is away."""
        inside = file.absolute().is_relative_to(self._folder.absolute())
        return str(file.absolute().relative_to(self._folder.absolute()) if inside else file.absolute())

    def _used(self, run: str) -> Sequence[Operation]:
        """The rows, where the run's folder says what they are."""
        if not (self._folder / DATA).is_file():
            return ()
        data = read_json(self._folder / DATA)
        return (Use(run=run, **{name: data[name] for name in ("name", "fingerprint", "rows", "inputs")}),)

    def _close_abandoned(self, experiments: Collection[str]) -> None:
        """Marks runs whose process was killed on this machine, which the UI would show as running for ever."""
        if not experiments:
            return
        running = self._client.search_runs([*experiments], filter_string="attributes.status = 'RUNNING'")
        for run in running:
            host, _, pid = run.data.tags.get("hasten.process", "").rpartition(":")
            if host == socket.gethostname() and not _is_alive(int(pid)):
                self._client.set_terminated(run.info.run_id, status="KILLED")

    def _training(
        self, iteration: str, trial: Trial, stage: str, curve: Mapping[str, Sequence[float]]
    ) -> Sequence[Operation]:
        """Once for each training: iterations that took the same stage from the store don't repeat it."""
        training = (stage, trial.stages.get(stage, f"of trial {trial.number}"))
        if training in self._trainings:
            return ()
        self._trainings.add(training)
        now, run = _now_ms(), f"{iteration}/{stage}"
        tags = {"hasten.kind": "training", "stage": stage}
        points = [
            (record.key(quantity), float(value), now, epoch)
            for quantity, values in curve.items()
            for epoch, value in enumerate(values)
        ]
        return (
            _create(run, f"{trial.number:02d} {stage} training", tags, parent=iteration),
            Log(run=run, points=points),
            End(run=run, status="FINISHED", end_ms=now),
        )


def _create(run: str, name: str, tags: Mapping[str, str], *, parent: str = "", seconds: float = 0.0) -> Create:
    """A new run that began so many seconds ago: the UI then shows how long it took."""
    reserved = {"mlflow.user": _user(), "mlflow.source.name": "hasten", "mlflow.source.type": "LOCAL"}
    return Create(
        run=run,
        name=name,
        tags={key: record.value(value) for key, value in (reserved | dict(tags)).items()},
        start_ms=_now_ms() - int(seconds * 1000),
        parent=parent,
    )


def _points(metrics: Mapping[str, float], step: int) -> list[tuple[str, float, int, int]]:
    now = _now_ms()
    return [(name, value, now, step) for name, value in metrics.items()]


def _kept(run: str, trial: Trial) -> list[Operation]:
    contents = {"trial.json": trial.to_dict()}
    if trial.profile is not None:
        contents["profile.json"] = trial.profile.to_dict()
    return [
        KeepText(run=run, file=name, text=without_credentials(json.dumps(content, indent=1)))
        for name, content in contents.items()
    ]


def _reason(error: Exception) -> str:
    return without_credentials(" ".join(str(error).split()))[:500] or type(error).__name__


def _records(number: int) -> str:
    return f"{number} record{'' if number == 1 else 's'}"


def _as_uri(folder: str) -> str:
    return folder if "://" in folder else Path(folder).absolute().as_uri()


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
