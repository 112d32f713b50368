"""A sweep goes on where it was ended, whoever or whatever ended it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten import cli
from hasten.sweeping.job import Job, identity

Found = Callable[[], dict[str, Any]]
TWO = "pruning=none,unstructured"
THREE = f"{TWO},structured"


def test_every_combination_runs_once_and_is_shown_again_where_it_is_asked_for_again(
    sweep: Any, pipeline: Any, found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(THREE) == 0
    first = capsys.readouterr().out
    assert pipeline.ran == ["none", "unstructured", "structured"]
    assert "[2/3] pruning=unstructured: accepted, p50 2.00 ms, 1.50x vs eager" in first
    summary = found()
    assert [job["choices"] for job in summary["jobs"]] == [{"pruning": option} for option in pipeline.ran]
    assert summary["front"] == [1, 2, 3]
    assert summary["best"] == 2
    assert summary["command"] == f"hasten -m run tracking=none {THREE}"
    page = next(tmp_path.glob("outputs/sweeps/*/report.html")).read_text()
    assert all("hasten run" in job["rebuild"] and job["rebuild"] in page for job in summary["jobs"])
    assert sweep(THREE, "sweep.again=null", "hydra.sweeper.max_batch_size=2") == 0
    again = capsys.readouterr().out
    assert len(pipeline.ran) == 3
    assert "all of them done before" in again
    assert again.splitlines()[1:] == first.splitlines()[4:]
    assert sweep(THREE, "sweep.again=all") == 0
    assert len(pipeline.ran) == 6


def test_ctrl_c_keeps_and_shows_what_is_done_and_only_the_rest_runs_later(
    sweep: Any, pipeline: Any, found: Found, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.interrupted = "structured"
    assert sweep(THREE) == 130
    captured = capsys.readouterr()
    assert "interrupted; 2 jobs are kept, 1 are missing: the same command goes on" in captured.out
    assert "hasten: interrupted" in captured.err
    assert "Traceback" not in captured.err
    assert [job["choices"]["pruning"] for job in found()["jobs"]] == ["none", "unstructured"]
    pipeline.interrupted, pipeline.ran[:] = "", []
    assert sweep(THREE) == 0
    assert pipeline.ran == ["structured"]
    assert len(found()["jobs"]) == 3


def test_failed_jobs_are_listed_with_their_reasons_and_tried_again_alone(
    sweep: Any, pipeline: Any, found: Found, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.fails = "unstructured"
    assert sweep(TWO) == 1
    told = capsys.readouterr().out
    assert "2 pruning=unstructured: nothing is left to prune" in told
    assert found()["failed"] == [2]
    assert sweep(TWO) == 1, "it has failed, and is not tried again by itself"
    pipeline.fails, pipeline.ran[:] = "", []
    assert sweep(TWO, "sweep.again=failed") == 0
    assert pipeline.ran == ["unstructured"]
    assert found()["failed"] == []


def test_a_file_of_the_config_that_has_changed_makes_the_job_another(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine" / "trainer" / "short.yaml"
    file.parent.mkdir(parents=True)
    text = "defaults: [default]\nepochs: 3\n"
    file.write_text(text)
    command = ["--config-dir", "mine", "-m", "run", "tracking=none", "trainer=short", "pruning=none,structured"]
    cli.run(command)
    cli.run(command)
    assert len(pipeline.ran) == 2
    file.write_text(text.replace("3", "4"))
    cli.run(command)
    assert len(pipeline.ran) == 4


def test_what_is_wrong_with_every_job_is_told_once_before_any_runs(
    sweep: Any, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("objective.max_dropp=0.1", "objective.max_drop=2"):
        assert sweep(THREE, wrong) == 2
        told = capsys.readouterr().err
        assert wrong.partition("=")[0].rpartition(".")[2] in told
        assert len(told.strip().splitlines()) == 1, told
    assert pipeline.ran == []
    assert not list(tmp_path.glob("outputs/sweeps/*/*/*"))


def test_what_is_wrong_with_one_job_is_its_own(sweep: Any, pipeline: Any, found: Found) -> None:
    assert sweep("pruning=none,structured", "pruning.sparsity=0.5") == 1
    assert pipeline.ran == ["structured"]
    none, structured = found()["jobs"]
    assert (none["verdict"], structured["verdict"]) == ("failed", "rejected")
    assert none["reason"].startswith("pruning.sparsity: pruning has no knobs as chosen")


def test_a_folder_of_the_users_own_is_taken_as_it_is(sweep: Any, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine, [all] of it"
    quoted = str(folder).replace("'", "\\'")
    assert sweep(TWO, f"hydra.sweep.dir='{quoted}'") == 0
    assert (folder / "sweep.json").is_file()
    assert len(list(folder.glob("*/job.json"))) == 2


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["sweep.again=some"], "again must be one of failed, all or null, got 'some' (sweep.again)"),
        (["hydra.sweep.subdir=mine"], "hydra.sweep.subdir is named after each job's overrides"),
        (["pruning.sparsity=interval(0,1)"], "pruning.sparsity=interval(0,1) is no list of choices"),
        (["hydra.sweeper.max_batch_size=0"], "max_batch_size must be at least 1 or null, got 0"),
        (["hydra/launcher=ray"], "hydra/launcher=ray needs hydra-ray-launcher: pip install 'hasten[ray]'"),
        (["hydra/launcher=rocket"], "hydra/launcher=rocket is no option of hydra/launcher"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_says_in_one_line_what_makes_no_sense(
    typed: list[str], told: str, sweep: Any, pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if "launcher=ray" in typed[0]:
        try:
            import hydra_plugins.hydra_ray_launcher  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("it is installed")
    assert sweep(TWO, *typed) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert pipeline.ran == []


def test_a_launcher_is_shown_as_its_file_here_spells_it() -> None:
    command = [sys.executable, "-m", "hasten.cli", "run", "hydra/launcher=joblib", "--cfg", "hydra", "-p", "hydra"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "n_jobs: null" in shown.stdout


def test_one_process_runs_a_sweep_at_a_time(
    sweep: Any, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(TWO)
    capsys.readouterr()
    (folder,) = tmp_path.glob("outputs/sweeps/*")
    holder = (
        "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        code = sweep(TWO)
        other.communicate("\n", timeout=30)
    assert code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hasten: this sweep is under way in process")
    assert sweep(TWO) == 0


def test_pipelines_that_only_show_something_show_it_each_time(
    sweep: Any, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for times in (1, 2):
        assert sweep(TWO, "dry_run=true") == 0
        assert len(pipeline.ran) == 2 * times
        assert "sweep" not in capsys.readouterr().out
    assert not list(tmp_path.glob("outputs/sweeps"))


def test_the_order_the_record_and_the_launcher_make_no_other_sweep() -> None:
    one = identity(["seed=1,2", "data=digits", "tracking=none"], None)
    assert one == identity(["data=digits", "seed=1,2", "sweep.again=all", "tracking.uri=sqlite:///x.db"], None)
    assert one != identity(["seed=1,3", "data=digits"], None)
    assert one != identity(["seed=1,2", "data=digits"], Path("mine"))


def test_a_job_is_named_after_its_choices() -> None:
    job = Job(overrides=("a.b=1", "pruning.layers=[x, y]"), varied=("pruning.layers=[x, y]",))
    assert job.name(None).rpartition("-")[0] == "layers-x-y"
    assert job.name(None) != job.name(Path("mine"))


def test_jobs_know_which_sweep_they_belong_to(sweep: Any, pipeline: Any, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []

    def main(session: Any) -> int:
        seen.append(os.environ.get("HASTEN_SWEEP"))
        return 0

    monkeypatch.setattr("hasten.pipelines.run.main", main)
    sweep("pruning=none,structured")
    (folder,) = tmp_path.glob("outputs/sweeps/*")
    assert seen == [folder.name] * 2
    assert "HASTEN_SWEEP" not in os.environ


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its logs to the collector
def test_submitits_debug_executor_runs_the_jobs(
    sweep: Any, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    monkeypatch.setattr(launcher.LocalLauncher, "_EXECUTOR", "debug")
    assert sweep(TWO, "hydra/launcher=submitit_local") == 0
    assert [job["verdict"] for job in found()["jobs"]] == ["accepted", "accepted"]
