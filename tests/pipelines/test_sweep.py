"""`hasten -m run`: many recipes over one store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hasten import cli


@pytest.mark.slow
def test_six_jobs_train_one_teacher(ran: Any, tiny: tuple[str, ...], store: Path, tmp_path: Path) -> None:
    # What other tests have measured, but no teacher: the sweep has to train it.
    shutil.copytree(store, "fresh", ignore=lambda folder, names: ["teacher"] if folder == str(store) else [])
    grid = ("engine=eager,onnxruntime", "objective.max_drop=0.02,0.2,0.5")
    code = cli.run(["-m", "run", *grid, *tiny[:-1], "store.folder=fresh"])
    assert code == 0
    assert len(list((tmp_path / "fresh" / "teacher").iterdir())) == 1
    files = sorted(tmp_path.glob("outputs/sweeps/*/*/summary.json"))
    names = [file.parent.name.rpartition("-")[0] for file in files]
    assert names == [f"engine-{name}_max_drop-{drop}" for name in ("eager", "onnxruntime") for drop in (0.02, 0.2, 0.5)]
    summaries = [json.loads(file.read_text()) for file in files]
    assert {summary["best"]["stages"]["teacher"] for summary in summaries} == {ran.summary["best"]["stages"]["teacher"]}
    assert [summary["certificate"]["margin"] for summary in summaries] == 2 * [0.02, 0.2, 0.5]
    # the first three are the untouched model, which is not measured against itself
    assert [len(summary["trials"]) for summary in summaries] == [1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_alone(
    ran: Any, tiny: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    jobs = ("pruning=structured", "pruning.round_to=8", "engine=eager,onnxruntime")
    code = cli.run(["-m", "run", *jobs, *tiny, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"])
    assert code == 1
    assert len(list(tmp_path.glob("outputs/sweeps/*/*/summary.json"))) == 2
    (file,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
    assert {job["verdict"] for job in json.loads(file.read_text())["jobs"]} == {"failed"}
    # Jobs of other processes write into their folders; the terminal has one line of each.
    printed = capfd.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        line for line in printed.splitlines() if "engine=" in line and "failed:" in line
    ]
    assert "trial 00 baseline" not in printed
    assert all("trial 00 baseline" in log.read_text() for log in tmp_path.glob("outputs/sweeps/*/*/log.txt"))
