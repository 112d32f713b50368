"""The store: keys, commit, locks, resume, verification."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.store import Ingredients, Store

STAGE = Ingredients(
    stage="teacher",
    config={"lr": 0.1, "arch": {"widths": [8, 16]}},
    parents={"data": "d" * 64},
    data="f" * 64,
    sources={"pkg.mod": "s"},
    libraries={"torch": "2.13"},
    machine={"isa": "avx2"},
)


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "student"},
        {"config": {"lr": 0.2, "arch": {"widths": [8, 16]}}},
        {"config": {"lr": 0.1, "arch": {"widths": [16, 8]}}},
        {"parents": {"data": "e" * 64}},
        {"data": None},
        {"sources": {"pkg.mod": "t"}},
        {"libraries": {"torch": "2.14"}},
        {"machine": {"isa": "avx512"}},
    ],
)
def test_the_key_changes_with_every_ingredient(changed: dict[str, object]) -> None:
    assert replace(STAGE, **changed).key != STAGE.key


@given(st.permutations([("lr", 0.1), ("epochs", 3), ("name", "x")]))
def test_the_key_ignores_the_order_of_config_keys(items: list[tuple[str, object]]) -> None:
    assert replace(STAGE, config=dict(items)).key == replace(STAGE, config=dict(sorted(items))).key


def test_builds_once_and_finds_it_again(tmp_path: Path) -> None:
    store, calls = Store(tmp_path / "store"), []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_text("w")

    first, second = store.build(STAGE, make), store.build(STAGE, make)
    assert len(calls) == 1
    assert first.fresh
    assert not second.fresh
    assert (second.folder / "weights").read_text() == "w"
    assert second.seconds == first.seconds


def test_a_failed_stage_leaves_nothing_that_would_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.build(STAGE, fail)
    assert store.find("teacher", STAGE.key) is None
    entry = store.build(STAGE, lambda folder: (folder / "whole").write_text("w") and None)
    assert sorted(path.name for path in entry.folder.iterdir()) == ["stage.json", "whole"]


def _killed(folder: Path) -> None:
    def make(work: Path) -> None:
        (work / "resume").mkdir()
        (work / "resume" / "last").write_text("step 7")
        (work / "half").write_text("h")
        os.kill(os.getpid(), signal.SIGKILL)

    Store(folder).build(STAGE, make)


def test_after_a_kill_the_next_process_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(folder,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [line.state for line in Store(folder).listing()] == ["unfinished"]
    seen = {}

    def make(work: Path) -> None:
        seen["checkpoint"] = (work / "resume" / "last").read_text()
        seen["half"] = (work / "half").exists()
        (work / "weights").write_text("w")

    entry = Store(folder).build(STAGE, make)
    assert seen == {"checkpoint": "step 7", "half": False}
    assert sorted(path.name for path in entry.folder.iterdir()) == ["stage.json", "weights"]
    assert [line.state for line in Store(folder).listing()] == ["finished"]


def _slow(folder: Path) -> None:
    def make(work: Path) -> None:
        time.sleep(0.5)
        with (folder.parent / "builds").open("a") as file:
            file.write("x")

    Store(folder).build(STAGE, make)


def test_two_processes_build_one_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slow, args=(tmp_path / "store",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert (tmp_path / "builds").read_text() == "x"


def test_verify_names_what_is_broken(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = store.build(STAGE, lambda folder: (folder / "weights").write_text("w") and None)
    assert [line.state for line in store.verify()] == ["finished"]
    (entry.folder / "weights").write_text("v")
    (entry.folder / "more").write_text("m")
    (line,) = store.verify()
    assert (line.state, line.problem) == ("broken", "changed weights; unknown more")
    (entry.folder / "weights").unlink()
    (line,) = store.verify()
    assert line.problem == "missing weights; unknown more"


def test_prune_removes_broken_unfinished_and_old_stages_and_keeps_the_rest(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    good = store.build(STAGE, lambda folder: (folder / "a").write_text("a") and None)
    broken = store.build(replace(STAGE, stage="student"), lambda folder: (folder / "a").write_text("a") and None)
    (broken.folder / "a").write_text("b")
    old = store.build(replace(STAGE, stage="export"), lambda folder: (folder / "a").write_text("a") and None)
    manifest = json.loads((old.folder / "stage.json").read_text())
    (old.folder / "stage.json").write_text(json.dumps({**manifest, "created": time.time() - 10 * 86400}))
    with pytest.raises(RuntimeError):
        store.build(replace(STAGE, stage="prune"), _raise)
    assert {line.stage for line in store.prune(days=5)} == {"student", "export", "prune"}
    assert [line.stage for line in store.listing()] == [good.stage]


def _raise(folder: Path) -> None:
    raise RuntimeError("no")


def test_a_resumed_stage_costs_what_its_killed_attempts_took_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(RuntimeError):
        store.build(STAGE, _raise)
    (work,) = (tmp_path / "store" / ".work").iterdir()
    attempt = json.loads((work / "resume-attempt.json").read_text())
    (work / "resume-attempt.json").write_text(json.dumps({**attempt, "began": attempt["began"] - 100}))
    entry = store.build(STAGE, lambda folder: (folder / "a").write_text("a") and None)
    assert 100 <= entry.seconds < 160
    assert sorted(path.name for path in entry.folder.iterdir()) == ["a", "stage.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", None])
def test_a_stage_without_a_readable_manifest_is_broken_and_built_again(tmp_path: Path, damage: str | None) -> None:
    store = Store(tmp_path / "store")
    entry = store.build(STAGE, lambda folder: (folder / "a").write_text("a") and None)
    manifest = entry.folder / "stage.json"
    manifest.unlink() if damage is None else manifest.write_text(damage)
    assert [(line.state, line.problem) for line in store.verify()] == [("broken", "no readable stage.json")]
    assert store.find("teacher", STAGE.key) is None
    again = store.build(STAGE, lambda folder: (folder / "a").write_text("b") and None)
    assert (again.folder / "a").read_text() == "b"
    manifest.write_text("")
    assert [line.stage for line in store.prune(days=None)] == ["teacher"]
    assert list(store.listing()) == []
