"""The notebook of the documentation, run by a kernel, and what it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten.core.interpreter import import_path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"

ASSERTIONS = """
import pandas as pd
assert isinstance(found.history, pd.DataFrame)
assert list(found.history.index) == [trial.number for trial in found.result.trials]
assert found.history.loc[0, "edit"] == ""
measured = found.history[found.history.verdict != "failed"].iloc[1:]
assert len(measured) and (measured.latency_ms > 0).all() and (measured.vs_eager_low <= measured.vs_eager_high).all()
assert (measured.drop_bound > 0).all()
assert found.history.rebuild.str.startswith("hasten run data=npz ").all()
assert found.best in found.front
assert len(found.result.trials) <= 3
assert (predicted == labels[:8]).mean() > 0.5
assert as_it_is.history.quality.iloc[0] == as_it_is.history.quality.iloc[1] > 0.8
assert as_it_is.result.certificate.held and as_it_is.result.certificate.rows == len(images) - 1250
assert "<html" in as_it_is.report.path.read_text() and str(as_it_is.report).endswith("report.html")
assert as_it_is.best.evaluation.metric == "accuracy" and as_it_is.best.number == 1
assert "SmallNet runs" in str(found) and "rebuild" in str(found)
assert as_it_is.result.experiment == "Sequential" and found.result.experiment == "SmallNet"
again = run([*quick[2:4], "tracking=none", "engine=onnxruntime", "data.normalize=false"], model=net, data=splits)
assert again.folder != as_it_is.folder
assert again.best.evaluation == as_it_is.best.evaluation, "it was measured once"
print("all held")
"""


EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

source, assertions, done = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
notebook.cells.append(nbformat.v4.new_code_cell(assertions))
NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
nbformat.write(notebook, done)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the notebook as it was executed, in a process of its own: the client leaves sockets open."""
    folder = tmp_path_factory.mktemp("notebook")
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK), ASSERTIONS, "done.ipynb"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": import_path(), "JUPYTER_PLATFORM_DIRS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "done.ipynb").read_text())["cells"]


@pytest.mark.slow
def test_the_notebook_runs_and_gets_what_it_says(cells: Any) -> None:
    assert cells[-1]["outputs"][-1]["text"][-1] == "all held\n"


@pytest.mark.slow
def test_it_shows_the_table_and_the_report(cells: Any) -> None:
    shown = "".join(str(output) for cell in cells for output in cell.get("outputs", ()))
    assert "engine=onnxruntime" in shown
    assert "<iframe" in shown
    assert "certified" in shown


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
