"""The way to a tracking store: whether it is there, a client on it, and what its errors mean."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock

from hasten.core.credentials import without_credentials

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
SECONDS_TO_ANSWER = 5
SECONDS_PER_REQUEST = "60"
"""That a server may take for one request, such as an artefact that it hands on to a slower storage."""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "REQUEST_LIMIT_EXCEEDED",
)
"""MLflow's codes for what would be refused again; after others the store may take it another time."""


def connect(uri: str) -> Any:
    """A client on the store, which is created and migrated where it is new (seconds, once).

    Telemetry is off because its thread would talk to the network while latencies are measured, and a server that does
    not answer is given up after seconds instead of minutes; both unless the user's environment says otherwise.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", SECONDS_PER_REQUEST)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings():
        # MLflow 3.17 on SQLAlchemy 2.1: "The ``noload`` loader strategy is deprecated".
        warnings.filterwarnings("ignore", message=".*noload.*")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It prints a traceback of each database error, beside raising it.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        # It tells every retry; that the server is away is told once, by us.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=absolute(uri))


def find_experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Its id; created where it is missing, brought back where somebody deleted it in the UI.

    Args:
        artifacts: where a new one keeps its artefacts; None where a server decides that.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            # A job on another machine was faster; no lock of ours covers a server.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        log.warning("the MLflow experiment %s had been deleted and is restored, to record this run in it", name)
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def is_refusal(error: Exception) -> bool:
    """Whether the store would refuse it again, so that waiting is of no use.

    A wrong password is none: with the right one it takes it.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # of an artefact, which goes its own way
        return 400 <= status < 500 and status not in (401, 403, 407, 408, 425, 429)
    if (code := getattr(error, "error_code", None)) is not None:
        return code in REFUSALS
    return isinstance(error, LookupError | TypeError | AttributeError | ValueError) and not isinstance(error, OSError)


def away(uri: str) -> str | None:
    """Why nothing answers where the store should be; None if something does, or it is a file.

    A client would try for minutes.
    """
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https"):
        return _silent(uri)
    if (port := PORTS.get(scheme.partition("+")[0])) is None:
        return None
    try:
        place = urlsplit(uri)
        if place.hostname is not None:
            socket.create_connection((place.hostname, place.port or port), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, ValueError) as error:
        return without_credentials(str(error))
    return None


def _silent(uri: str) -> str | None:
    """Why a tracking server gives no sign of health; None if it does. It is asked as MLflow asks, with what it knows of
    passwords and certificates."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        creds = get_default_host_creds(uri.rstrip("/"))
        answer = http_request(
            creds, "/health", "GET", timeout=SECONDS_TO_ANSWER, max_retries=0, retry_codes=(), raise_on_status=False
        )
    except Exception as error:
        return without_credentials(_cause(error))
    return f"it answers {answer.status_code} {answer.reason}" if answer.status_code >= 500 else None


def _cause(error: BaseException) -> str:
    """The innermost reason that a library gives, in one line: `Connection refused`."""
    while (inner := error.__cause__ or error.__context__ or _argument(error)) is not None:
        error = inner
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _argument(error: BaseException) -> BaseException | None:
    """urllib3 puts the reason in its own error's arguments."""
    candidates = (*error.args, getattr(error, "reason", None))
    return next((each for each in candidates if isinstance(each, BaseException)), None)


def problem(uri: str) -> str | None:
    """Why the store can't be written; None where it can. Other databases than sqlite are only tried by a run."""
    shown = without_credentials(uri)
    if reason := away(uri):
        return f"{shown} does not answer: {reason} (tracking.uri)"
    if uri.startswith(SQLITE) and (reason := _unwritable(Path(absolute(uri).removeprefix(SQLITE)))):
        return f"{shown} can't be written: {reason} (tracking.uri)"
    return None


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Lets one process at a time create and migrate a local database: two at once leave it broken."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(absolute(uri).removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=120):
        yield


def absolute(uri: str) -> str:
    """The URI, with the path of a sqlite file from the root on."""
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute()) if uri.startswith(SQLITE) else uri


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


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
