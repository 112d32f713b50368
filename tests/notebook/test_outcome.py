"""What a notebook gets back, and what it is told of calls that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import hasten
from hasten.core.errors import ConfigError, HastenError
from hasten.notebook import Outcome


def test_a_training_has_a_history_with_figures_of_its_own(training_result: Any, tmp_path: Path) -> None:
    found = Outcome(result=training_result, folder=tmp_path)
    assert list(found.history.verdict) == ["accepted", "accepted", "rejected", "failed"]
    prepared = found.history.loc[1]
    assert (prepared.edit, prepared.rows_per_second, prepared.vs_plain) == ("loader=default", 1820.0, 2.0)
    assert prepared.vs_best_low < prepared.vs_best < prepared.vs_best_high
    assert found.history.rows_per_second.isna().tolist() == [False, False, False, True]
    assert found.front == (found.best,) == (training_result.best,)
    assert training_result.command in str(found)
    assert "loader=default" in found._repr_html_()
    with pytest.raises(HastenError, match="makes training faster deploys no model"):
        found.load()


def test_a_report_is_its_path_and_its_page(training_result: Any, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<html>"&</html>')
    report = Outcome(result=training_result, folder=tmp_path).report
    assert str(report) == str(tmp_path / "report.html")
    assert Path(report).read_text() == '<html>"&</html>'
    assert 'srcdoc="&lt;html&gt;&quot;&amp;' in report._repr_html_()


def test_what_is_given_twice_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = (np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    with pytest.raises(ConfigError, match="model is given twice: as an object, and by the override model="):
        hasten.optimize(["model=mlp"], model=nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="data is given twice"):
        hasten.run(["data=digits"], data=rows)
    with pytest.raises(ConfigError, match="overrides are a list of texts"):
        hasten.run("engine=onnxruntime")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
