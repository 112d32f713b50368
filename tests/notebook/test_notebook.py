"""The notebook of the documentation, run by a kernel, and what it gets."""

from __future__ import annotations

import sys
import warnings
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
assert as_it_is.result.certificate.held and as_it_is.result.certificate.rows + 0 > 390
assert "<html" in as_it_is.report.path.read_text() and str(as_it_is.report).endswith("report.html")
assert as_it_is.best.evaluation.metric == "accuracy"
assert as_it_is.result.experiment == "Sequential" and found.result.experiment == "SmallNet"
again = run([*quick[2:4], "tracking=none", "engine=onnxruntime", "data.normalize=false"], model=net, data=splits)
assert again.folder != as_it_is.folder
assert again.best.evaluation == as_it_is.best.evaluation, "it was measured once"
print("all held")
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with warnings.catch_warnings():
        # Of the kernel's own libraries.
        warnings.simplefilter("ignore")
        import nbformat
        from jupyter_client.manager import KernelManager
        from nbclient import NotebookClient

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(ASSERTIONS))
        folder = tmp_path_factory.mktemp("notebook")
        manager = KernelManager()
        manager.kernel_spec.argv[0] = sys.executable
        client = NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": str(folder)}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", import_path())
            client.execute()
    return notebook


@pytest.mark.slow
def test_the_notebook_runs_and_gets_what_it_says(executed: Any) -> None:
    assert executed.cells[-1].outputs[0].text == "all held\n"


@pytest.mark.slow
def test_it_shows_the_table_and_the_report(executed: Any) -> None:
    shown = "".join(str(output) for cell in executed.cells for output in cell.outputs)
    assert "engine=onnxruntime" in shown
    assert "<iframe" in shown
    assert "certified" in shown


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    import json

    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
