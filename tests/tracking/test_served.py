"""The logged model under MLflow's own scoring server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.tracking.logged_model import save

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture
def logged(run_folder: Path, tmp_path: Path) -> Any:
    """What `mlflow.pyfunc.load_model` makes of a deployed folder."""
    there = SimpleNamespace(artifact_location=None, model_id=None)
    saved = save(run_folder / "model", tmp_path / "logged", "", there)
    import mlflow

    return mlflow.pyfunc.load_model(str(saved))


def answer(logged: Any, body: bytes, content_type: str | None = "application/json") -> Any:
    """Status and text, as the server gives them."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    logged.unwrap_python_model().load_context(logged._model_impl.context)  # as within the server, which is loaded now
    try:
        done = scoring_server.invocations(body, content_type, logged, logged.metadata.get_input_schema())
    except MlflowException as error:
        return error.get_http_status_code(), error.message
    return done.status, done.response


@pytest.mark.slow
def test_good_requests_are_answered_and_bad_ones_get_400_with_the_reason(logged: Any) -> None:
    assert answer(logged, json.dumps({"inputs": np.ones((2, 4)).tolist()}).encode())[0] == 200
    bad = {
        b'{"inputs": [[1, 2, 3]]}': "shape",
        b'{"inputs": [[NaN, 1, 2, 3]]}': "must be finite numbers",
        b'{"inputs": []}': "",
        b'{"inputs": [[1, 2, 3, 4], [5]]}': "",
        b'{"inputs": null}': "",
        b"{": "valid JSON",
        b"": "valid JSON",
        b'{"inputs": ' + b"[" * 100_000: "",
    }
    for body, reason in bad.items():
        status, text = answer(logged, body)
        assert 400 <= status < 500, (body[:60], status, text[:300])
        assert reason in text
    assert answer(logged, b"{}", None)[0] == 415


@pytest.mark.drill
def test_a_served_model_stands_eight_clients_and_malformed_requests(run_folder: Path) -> None:
    command = [sys.executable, str(BENCHMARK), str(run_folder), "--seconds", "2", "--malformed", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "still alive, with the right answer" in done.stdout
