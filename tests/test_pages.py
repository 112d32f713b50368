"""Pages of the documentation that a reader is to follow: every block of theirs is run, in order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hasten.core.interpreter import import_path

PAGES = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 900
"""A command of these pages takes less than thirty where the machine is not busy with other things."""


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A page that was followed.

    Attributes:
        folder: in which.
        printed: command -> what it printed.
    """

    folder: Path
    printed: dict[str, str]

    def of(self, start: str) -> str:
        """What the commands that begin so printed."""
        return "".join(text for command, text in self.printed.items() if command.startswith(start))


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, file name (or none) and text of each block."""
    for found in BLOCK.finditer((PAGES / page).read_text(encoding="utf-8")):
        yield found[1], found[2] or "", found[3]


def followed(page: str, folder: Path) -> Followed:
    """Writes the files and types the commands of a page."""
    commands = folder / "bin"
    commands.mkdir()
    for name, line in {"hasten": f'"{sys.executable}" -m hasten.cli', "python": f'"{sys.executable}"'}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (commands / name).chmod(0o755)
    work = folder / "work"
    work.mkdir()
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": import_path()}
    printed = {}
    for language, name, text in blocks(page):
        assert name or language == "bash", f"{page}: a block that is neither a file nor a command: {text[:60]}"
        if name:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
            continue
        for command in text.splitlines():
            done = subprocess.run(
                command,
                shell=True,
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed[command] = done.stdout
    return Followed(folder=work, printed=printed)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    return followed("bring-your-own.md", tmp_path_factory.mktemp("own"))


@pytest.mark.slow
def test_bring_your_own_ends_in_a_certified_artefact(own: Followed) -> None:
    summary = json.loads((own.folder / "outputs" / "mine" / "summary.json").read_text())
    assert summary["certificate"]["held"]
    assert summary["best"]["number"] > 0
    assert summary["certificate"]["statement"] in own.of("python read_it.py")
    predicted, labels = own.of("python use_it.py").strip().split("] [")
    assert predicted.startswith("[0, 1, 2")
    assert labels == "0, 1, 2, 3, 4]"
    assert "to be built" in own.of(
        "hasten --config-dir conf experiment=mine strategy=[engine,static_int8] dry_run=true"
    )


@pytest.mark.slow
def test_metrics_of_the_readers_own_are_bounded_and_certified(own: Followed) -> None:
    certificate = json.loads((own.folder / "outputs" / "mine" / "summary.json").read_text())["certificate"]
    metrics = certificate["metrics"]
    assert list(metrics) == ["accuracy", "among_two", "worst_confusion"]
    assert metrics["among_two"]["higher_is_better"]
    assert not metrics["worst_confusion"]["higher_is_better"]
    for metric in metrics.values():
        assert metric["drop"]["value"] <= metric["drop"]["bound"] <= metric["max_drop"]
    # Lower is better: what rose was lost.
    rise = metrics["worst_confusion"]["value"] - certificate["baselines"]["worst_confusion"]
    assert metrics["worst_confusion"]["drop"]["value"] == pytest.approx(rise, abs=1e-9)
    assert metrics["accuracy"]["value"] <= metrics["among_two"]["value"]


@pytest.mark.slow
def test_weights_that_are_there_are_the_baseline(own: Followed) -> None:
    printed = own.of("hasten --config-dir conf run experiment=mine model.checkpoint")
    trained = json.loads((own.folder / "outputs" / "mine" / "summary.json").read_text())
    assert f"accuracy {100 * trained['baseline']['evaluation']['quality']:.1f} %" in printed


@pytest.mark.slow
def test_a_model_of_hugging_face_from_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="hasten[transformers] is not installed")
    done = followed("hugging-face.md", tmp_path)
    summary = json.loads((done.folder / "outputs" / "bert" / "summary.json").read_text())
    assert summary["best"]["evaluation"]["quality"] > 0.3
    assert len(done.of("python ask_it.py").split(",")) == 9
