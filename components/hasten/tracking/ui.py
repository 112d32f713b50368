"""MLflow's own user interface on a store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.tracking import connection

EXPERIMENTS = "#/experiments?workflowType=machine_learning"
"""Where MLflow shows what was trained; its front page is about language models."""
SECONDS_TO_START = 60.0
SECONDS_TO_END = 5.0


def serve(uri: str, artifacts: str, *, host: str, port: int, told: Callable[[str], None]) -> None:
    """Shows a store until Ctrl-C: of a server its address alone, as it has a user interface already.

    Args:
        artifacts: folder of the artefacts of a local store.
        port: 0 for any that is free.

    Raises:
        ConfigError: the store can't be reached or holds nothing yet, or the port is taken.
        HastenError: MLflow's server ended by itself.
    """
    shown = without_credentials(uri)
    if problem := connection.problem(uri):
        raise ConfigError(problem)
    if connection.is_server(uri):
        told(f"the record is at {shown}")
        return
    if (
        uri.startswith(connection.SQLITE)
        and not (database := Path(connection.absolute(uri).removeprefix(connection.SQLITE))).is_file()
    ):
        raise ConfigError(f"{database} is not there yet: no run has been recorded (tracking.uri)")
    chosen = _free(host, port)
    for kind in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it in the background
        signal.signal(kind, signal.default_int_handler)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(chosen)),
                # As a variable: everybody can read the arguments of a process, and there may be a password in it.
                *("--default-artifact-root", _place(artifacts)),
            ],
            env=os.environ
            | {
                "MLFLOW_BACKEND_STORE_URI": connection.absolute(uri),
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that Ctrl-C comes to us alone, and we end all of its processes
        )
        try:
            began = time.monotonic()
            address = f"http://{host if host != '0.0.0.0' else socket.gethostname()}:{chosen}"
            _wait(server, f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{chosen}")
            told(f"{shown} is at {address}/{EXPERIMENTS} ({time.monotonic() - began:.1f} s); Ctrl-C ends it")
            server.wait()
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise HastenError(f"MLflow's server ended by itself: {without_credentials(last[0])}")
        except KeyboardInterrupt:
            told("ended")
        finally:
            _end(server)


def _place(artifacts: str) -> str:
    return artifacts if "://" in artifacts else str(Path(artifacts).absolute())


def _free(host: str, port: int) -> int:
    """The port, or one that is free in place of 0.

    Raises:
        ConfigError: it is taken, or the address is none of this machine.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{host}:{port} can't be listened at: {reason} (ui.host, ui.port; ui.port=0 takes any)"
        ) from error


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    """Until it answers, or has ended."""
    deadline = time.monotonic() + SECONDS_TO_START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{address}/health", timeout=1):
                return
        except (OSError, HTTPException):
            time.sleep(0.1)


def _end(server: subprocess.Popen[bytes]) -> None:
    """All of its processes; those that don't end by themselves are killed."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            server.wait(SECONDS_TO_END)
