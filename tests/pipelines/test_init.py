"""`hasten init`: a project that runs as it is, and nothing of anybody's overwritten."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from hasten import cli

FILES = {
    "README.md",
    "my_model.py",
    "digits.parquet",
    "conf/data/mine.yaml",
    "conf/model/mine.yaml",
    "conf/experiment/mine.yaml",
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_the_whole_project_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init"]) == 0
    assert set(files(tmp_path)) == {f"my_project/{name}" for name in FILES}
    assert "cd my_project" in capsys.readouterr().out


def test_writes_where_it_is_asked_to_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "notes.txt").write_text("mine")
    assert cli.run(["init", "init.folder=work/deep"]) == 0
    assert set(files(tmp_path / "work" / "deep")) == FILES | {"notes.txt"}


@pytest.mark.parametrize("there", sorted(FILES))
def test_overwrites_nothing_and_then_writes_nothing(
    tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_project" / there
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    assert cli.run(["init"]) == 2
    assert files(tmp_path) == {f"my_project/{there}": b"years of work"}
    assert f"init.folder=my_project has {there} already" in capsys.readouterr().err


def test_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hasten.pipelines.init._write_digits", full)
    assert cli.run(["init"]) == 2
    assert files(tmp_path) == {}
    assert "init.folder=my_project can't be written: No space left on device" in capsys.readouterr().err


def test_says_that_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_project").write_text("")
    assert cli.run(["init"]) == 2
    assert "init.folder=my_project is no folder" in capsys.readouterr().err


def test_every_file_says_in_its_first_line_what_it_is(tmp_path: Path) -> None:
    assert cli.run(["init"]) == 0
    for name, content in files(tmp_path / "my_project").items():
        if name != "digits.parquet":
            first = content.decode().splitlines()[0]
            assert first.startswith(("# ", '"""')), name


def test_the_rows_are_the_digits(tmp_path: Path) -> None:
    from pyarrow import parquet
    from sklearn.datasets import load_digits

    assert cli.run(["init"]) == 0
    columns = parquet.read_table(tmp_path / "my_project" / "digits.parquet").to_pydict()
    digits = load_digits()
    np.testing.assert_array_equal(np.array(columns["image"])[:, 0], digits.images)
    np.testing.assert_array_equal(columns["label"], digits.target)


def shell(text: str, language: str) -> list[str]:
    """The code blocks of a README in one language."""
    return [
        "\n".join(line.removeprefix("   ") for line in block.splitlines()).strip()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


@pytest.mark.slow
def test_a_project_anywhere_reaches_a_certified_artefact_from_the_wheel_alone(tmp_path: Path, wheel_file: Path) -> None:
    site, commands, elsewhere = (tmp_path / name for name in ("site", "bin", "elsewhere"))
    ZipFile(wheel_file).extractall(site)
    commands.mkdir()
    elsewhere.mkdir()
    (commands / "hasten").write_text(f"#!{sys.executable}\nfrom hasten.cli import main\n\nmain()\n")
    (commands / "hasten").chmod(0o755)
    search = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(site)}

    def run(*words: str, folder: Path) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import hasten; print(hasten.__file__)", folder=elsewhere)
    assert Path(where.strip()).is_relative_to(site)
    run("hasten", "init", folder=elsewhere)
    project = elsewhere / "my_project"
    readme = (project / "README.md").read_text()
    plan, optimise = shell(readme, "")
    (use,) = shell(readme, "python")
    assert "to be built" in run(*shlex.split(plan), folder=project)
    quick = ("planner.max_trials=2", "trainer.epochs=4", "strategy=[engine]", "tracking=none", "hydra.run.dir=done")
    run(*shlex.split(optimise), *quick, folder=project)
    assert json.loads((project / "done" / "summary.json").read_text())["certificate"]["held"]
    printed = run(sys.executable, "-c", use.replace("outputs/<date>/<time>", "done"), folder=project)
    assert re.search(r"\[0, 1, 2, 3, 4\]", printed)
