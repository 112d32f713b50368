"""What is logged in MLflow, as data: operations that can be written down, sent later, and sent twice without harm.

Every operation brings its store to a state instead of adding to it: a run is looked for by its key before it is
created, metrics carry their time, artefacts are written over. So a record whose sending broke off anywhere is sent
again from the beginning, and ends as if nothing had happened.
"""

from __future__ import annotations

import abc
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.tracking import connection

log = logging.getLogger(__name__)

KEY = "hasten.key"
"""Tag by which a run is found again; made where it is recorded, so that it is known before the store knows the run."""
MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
DIGEST_CHARACTERS = 12
"""Of a fingerprint that stand beside the name of the rows in the UI; all of it is in their source."""


@dataclass(kw_only=True)
class Desk:
    """An experiment in a store, and the folder of the hasten run that is recorded in it.

    Attributes:
        client: MLflow's.
        experiment: its id.
        folder: that relative paths begin at.
    """

    client: Any
    experiment: str
    folder: Path
    _ids: dict[str, str] = field(default_factory=dict)

    def find(self, key: str) -> str | None:
        """The id of the run with this key; None where there is none yet."""
        if key not in self._ids:
            found = self.client.search_runs([self.experiment], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
            if not found:
                return None
            self._ids[key] = str(found[0].info.run_id)
        return self._ids[key]

    def run(self, key: str) -> str:
        """The id of a run that there has to be.

        Raises:
            LookupError: it was refused, or somebody has deleted it.
        """
        if (found := self.find(key)) is None:
            raise LookupError(f"the run {key} is not in the store")
        return found

    def created(self, key: str, run: str) -> None:
        """Remembers a new run."""
        self._ids[key] = run


@dataclass(frozen=True, kw_only=True)
class Operation(abc.ABC):
    """One thing to be done to a run.

    Attributes:
        run: key of the run.
    """

    run: str

    @abc.abstractmethod
    def send(self, desk: Desk) -> None:
        """Does it, whether or not it, or a part of it, has been done before."""

    def to_dict(self) -> dict[str, Any]:
        return {"do": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Create(Operation):
    """A run of its own.

    Attributes:
        parent: key of the run that it belongs to; empty for none.
        start_ms: since 1970.
    """

    name: str
    tags: Mapping[str, str]
    start_ms: int
    parent: str = ""

    def send(self, desk: Desk) -> None:
        if desk.find(self.run) is not None:
            return
        parent = {"mlflow.parentRunId": desk.run(self.parent)} if self.parent else {}
        tags = {**self.tags, **parent, KEY: self.run}
        made = desk.client.create_run(desk.experiment, start_time=self.start_ms, run_name=self.name, tags=tags)
        desk.created(self.run, str(made.info.run_id))


@dataclass(frozen=True, kw_only=True)
class Log(Operation):
    """Parameters, tags and points of metrics: (name, value, milliseconds since 1970, step)."""

    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[tuple[str, float, int, int]] = ()

    def send(self, desk: Desk) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run = desk.run(self.run)
        params = [Param(name, value) for name, value in self.params.items()]
        for first in range(0, len(params), MAX_PARAMS_PER_CALL):
            desk.client.log_batch(run, params=params[first : first + MAX_PARAMS_PER_CALL])
        points = [Metric(*point) for point in self.points]
        for first in range(0, len(points), MAX_METRICS_PER_CALL):
            desk.client.log_batch(run, metrics=points[first : first + MAX_METRICS_PER_CALL])
        if self.tags:
            desk.client.log_batch(run, tags=[RunTag(name, value) for name, value in self.tags.items()])


@dataclass(frozen=True, kw_only=True)
class KeepText(Operation):
    """An artefact, with what stands in it."""

    file: str
    text: str

    def send(self, desk: Desk) -> None:
        desk.client.log_text(desk.run(self.run), self.text, self.file)


@dataclass(frozen=True, kw_only=True)
class KeepFiles(Operation):
    """Artefacts: name in the record -> file, absolute or from the run's folder on."""

    files: Mapping[str, str]

    def send(self, desk: Desk) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for name, path in self.files.items():
                file = (desk.folder / path).absolute()
                if not file.exists():
                    log.warning("%s is no longer there and is not recorded", file)
                    continue
                link = Path(scratch, name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)  # the client names a file after its path, and copies nothing twice
            desk.client.log_artifacts(desk.run(self.run), scratch)


@dataclass(frozen=True, kw_only=True)
class Rename(Operation):
    """The name that people see."""

    name: str

    def send(self, desk: Desk) -> None:
        desk.client.update_run(desk.run(self.run), name=self.name)


@dataclass(frozen=True, kw_only=True)
class End(Operation):
    """The end of a run: `FINISHED`, `FAILED` or `KILLED`."""

    status: str
    end_ms: int

    def send(self, desk: Desk) -> None:
        desk.client.set_terminated(desk.run(self.run), status=self.status, end_time=self.end_ms)


@dataclass(frozen=True, kw_only=True)
class Use(Operation):
    """The rows that a run was trained, chosen and certified on.

    Attributes:
        name: of the data.
        fingerprint: of all rows as they came.
        rows: number of rows of each part: `train`, `validate`, `test`.
        inputs: name -> shape of a row and type.
    """

    name: str
    fingerprint: str
    rows: Mapping[str, int]
    inputs: Mapping[str, str]

    def send(self, desk: Desk) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        used = [
            DatasetInput(
                # MLflow takes what has the same name and digest for the same.
                Dataset(
                    name=f"{self.name} {part}",
                    digest=self.fingerprint[:DIGEST_CHARACTERS],
                    source_type="hasten",
                    source=json.dumps({"data": self.name, "part": part, "fingerprint": self.fingerprint}),
                    schema=json.dumps({"inputs": dict(self.inputs)}),
                    profile=json.dumps({"num_rows": number}),
                ),
                [InputTag("mlflow.data.context", part)],
            )
            for part, number in self.rows.items()
        ]
        desk.client.log_inputs(desk.run(self.run), used)


@dataclass(frozen=True, kw_only=True)
class KeepModel(Operation):
    """The deployed folder as a model that `mlflow models serve` serves. It stays data: graphs and JSON.

    Attributes:
        points: metrics of the model, as of `Log`.
        register: name under which it becomes a version in MLflow's registry; None for none.
        tags: of that version.
    """

    folder: str
    points: Sequence[tuple[str, float, int, int]] = ()
    register: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def send(self, desk: Desk) -> None:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

        from hasten.tracking.logged_model import save

        run = desk.run(self.run)
        folder = (desk.folder / self.folder).absolute()
        if not folder.is_dir():
            log.warning("%s is no longer there and is not recorded", folder)
            return
        name = folder.name
        client, mine = desk.client, f"source_run_id = '{run}' AND name = '{name}'"
        found = client.search_logged_models([desk.experiment], filter_string=mine)
        if found:
            model = found[0]
        else:
            params = dict(client.get_run(run).data.params)
            model = client.create_logged_model(desk.experiment, name=name, source_run_id=run, params=params)
        outputs = client.get_run(run).outputs
        if model.model_id not in [each.model_id for each in (outputs.model_outputs if outputs else ())]:
            client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
        if model.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as scratch:
                client.log_model_artifacts(model.model_id, str(save(folder, Path(scratch, "model"), run, model)))
            points = [Metric(*point, model_id=model.model_id) for point in self.points]
            for first in range(0, len(points), MAX_METRICS_PER_CALL):
                client.log_batch(run, metrics=points[first : first + MAX_METRICS_PER_CALL])
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if self.register is not None:
            self._registered(client, self.register, run, model)

    def _registered(self, client: Any, name: str, run: str, model: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run}'")
        if not versions:
            # Of a local store MLflow 3.17 would look for the model's URI in its global store, which is the user's.
            server = connection.is_server(client.tracking_uri)
            source = f"models:/{model.model_id}" if server else model.artifact_location
            client.create_model_version(name, source, run_id=run, tags=dict(self.tags), model_id=model.model_id)


KINDS: Mapping[str, type[Operation]] = {
    kind.__name__: kind for kind in (Create, Log, KeepText, KeepFiles, Use, Rename, End, KeepModel)
}


def operation(written: Mapping[str, Any]) -> Operation:
    """What `Operation.to_dict` gave, from JSON."""
    return KINDS[written["do"]](**{name: value for name, value in written.items() if name != "do"})
