"""A run that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.drill

NUM_KILLS = 10
MID_TRAINING = range(2, 6)
"""Kills that wait until the training has a checkpoint of its own; the others strike at any moment."""
DETERMINED = ("data", "teacher", "answers", "student", "prune", "export", "quantize", "compile", "outputs")
"""Stages whose bytes follow from their key. What is measured is measured anew in another store."""

STRATEGIES = {
    "quick": "[engine=onnxruntime]",
    "small": "[pruning=structured, pruning.round_to=2, distillation=soft_labels]",
    "integers": "[quantization=static]",
}
EXPERIMENT = (
    "model.arch.widths=[8]",
    "model.arch.num_blocks=1",
    "model.training.epochs=120",
    "trainer.epochs=3",
    "trainer.batch_size=16",
    "trainer.threads=1",
    "target.engines=[eager,onnxruntime]",
    "planner.max_trials=3",
    f"strategy=[{','.join(STRATEGIES)}]",
    "callbacks.checkpoint_seconds=1",
    "tracking=none",
)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = tmp_path / "conf" / "strategy"
    folder.mkdir(parents=True)
    for gain, (name, attempt) in enumerate(STRATEGIES.items(), start=2):
        factors = f"{{compute: {9 - gain}, memory: {9 - gain}, overhead: {9 - gain}}}"
        (folder / f"{name}.yaml").write_text(
            f"# @package strategies.{name}\n# For the drill\n"
            f"addresses: {factors}\nattempts:\n  - {attempt}\nsearch: null\ncost: 10\n"
        )
    return tmp_path / "conf"


@contextmanager
def hasten(conf: Path, store: Path, left: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The run as a session of its own, and the mark that it and all its workers carry in their environment."""
    mark = uuid.uuid4().hex
    command = ["--config-dir", str(conf), *EXPERIMENT, f"store.folder={store}", f"hydra.run.dir={left}"]
    with (
        left.with_suffix(".log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "hasten.cli", *command],
            stdout=log,
            stderr=log,
            env={**os.environ, "HASTEN_DRILL": mark},
            start_new_session=True,
            text=True,
        ) as process,
    ):
        yield process, mark


def marked(mark: str) -> list[int]:
    """Processes that carry the mark and are no zombies."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes() and ") Z " not in (environment.parent / "stat").read_text():
                found.append(int(environment.parent.name))
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return found


def stages(store: Path) -> dict[str, dict[str, Any]]:
    """Stage and key -> manifest of everything finished."""
    manifests = [json.loads(file.read_text()) for file in store.glob("*/*/stage.json")]
    return {f"{manifest['stage']}/{manifest['key']}": manifest for manifest in manifests}


def assert_kept(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Nothing that was finished is gone, or was made a second time."""
    assert {name: after.get(name) for name in before} == before


def decisions(left: Path) -> list[dict[str, Any]]:
    trials = json.loads((left / "summary.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key != "spent"} for trial in trials]


def wait_for_checkpoint(store: Path, process: subprocess.Popen[str]) -> None:
    """Until the training has written a checkpoint since the process started, or it turns out not to train."""
    start = time.time()
    while process.poll() is None and not list(store.glob("teacher/*/stage.json")):
        if any(file.stat().st_mtime > start for file in store.glob(".work/teacher-*/resume/step=*.ckpt")):
            return
        time.sleep(0.05)


def test_ten_kills_change_nothing_and_repeat_nothing(conf: Path, tmp_path: Path) -> None:
    undisturbed, store = tmp_path / "undisturbed", tmp_path / "store"
    with hasten(conf, undisturbed, tmp_path / "whole") as (process, _):
        assert process.wait(600) == 0, (tmp_path / "whole.log").read_text()

    generator = random.Random(0)
    before: dict[str, Any] = {}
    told = []
    for number in range(NUM_KILLS):
        with hasten(conf, store, tmp_path / f"killed-{number}") as (process, mark):
            if number in MID_TRAINING:
                wait_for_checkpoint(store, process)
                time.sleep(generator.uniform(0, 2))
            else:
                time.sleep(generator.uniform(1, 8))  # a quiet machine finishes the rest in less than a minute
            alive = process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        checkpoints = [file.name for file in store.glob(".work/teacher-*/resume/step=*.ckpt")]
        told.append(f"kill {number}: alive {alive}, {len(stages(store))} stages, checkpoints {checkpoints}")
        deadline = time.monotonic() + 30
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert marked(mark) == [], "workers outlived the run"
        after = stages(store)
        assert_kept(before, after)
        before = after
        assert alive, f"it ended before kill {number}: {told}"
    assert sum("step=" in line for line in told) >= 2, told

    with hasten(conf, store, tmp_path / "finished") as (process, _):
        assert process.wait(600) == 0, (tmp_path / "finished.log").read_text()
    finished = stages(store)
    assert_kept(before, finished)

    with hasten(conf, store, tmp_path / "replayed") as (process, _):
        assert process.wait(600) == 0, (tmp_path / "replayed.log").read_text()
    assert stages(store) == finished
    assert decisions(tmp_path / "replayed") == decisions(tmp_path / "finished")

    wholly = stages(undisturbed)
    both = {name for name in wholly.keys() & finished.keys() if name.partition("/")[0] in DETERMINED}
    assert {name: finished[name]["files"] for name in both} == {name: wholly[name]["files"] for name in both}
    kinds = [name.partition("/")[0] for name in both]
    print(*told, sep="\n")
    print(f"{len(both)} of {len(finished)} stages determined by their keys, all with equal bytes: {sorted(kinds)}")
    assert {"teacher", "answers", "prune", "export", "compile", "outputs"} <= set(kinds)
