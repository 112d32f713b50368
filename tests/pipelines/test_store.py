"""`hasten store`: what is in the store, whether it is whole, and how to get rid of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import cli
from hasten.core.store import Ingredients, Store

OLD = Ingredients(stage="teacher", config={"lr": 0.1})
NEW = Ingredients(stage="student", config={"lr": 0.1})


def hasten_store(capsys: pytest.CaptureFixture[str], action: str, *overrides: str) -> tuple[int, str]:
    code = cli.run(["store", f"store.action={action}", "store.folder=mine", *overrides])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two finished stages, and one whose process was killed."""
    store = Store(tmp_path / "mine")
    for ingredients in (OLD, NEW):
        store.build(ingredients, lambda folder: (folder / "weights").write_text("w") and None)
    (store.folder / ".work" / f"prune-{'a' * 64}").mkdir(parents=True)
    return store


def test_lists_every_stage_with_its_state(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = hasten_store(capsys, "list")
    assert code == 0
    for stage, key, state in (
        ("teacher", OLD.key, "finished"),
        ("student", NEW.key, "finished"),
        ("prune", "a" * 64, "unfinished"),
    ):
        (line,) = [line for line in printed.splitlines() if key[:12] in line]
        assert stage in line
        assert state in line


def test_verify_of_whole_stages_ends_with_0(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert hasten_store(capsys, "verify")[0] == 0


def test_verify_names_a_broken_stage_and_ends_with_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.folder / "teacher" / OLD.key / "weights").write_text("v")
    code, printed = hasten_store(capsys, "verify")
    assert code == 1
    (line,) = [line for line in printed.splitlines() if OLD.key[:12] in line]
    assert "broken" in line
    assert "changed weights" in printed


def test_prune_removes_what_is_unfinished_and_broken(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.folder / "teacher" / OLD.key / "weights").write_text("v")
    code, printed = hasten_store(capsys, "prune")
    assert code == 0
    assert OLD.key[:12] in printed
    assert NEW.key[:12] not in printed
    assert [(line.stage, line.state) for line in store.listing()] == [("student", "finished")]


def test_prune_removes_what_is_too_old(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert hasten_store(capsys, "prune", "store.days=0")[0] == 0
    assert list(store.listing()) == []


def test_looking_at_the_store_leaves_nothing_behind(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hasten_store(capsys, "list")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_store_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hasten_store(capsys, "list")[0] == 0
    assert hasten_store(capsys, "verify")[0] == 0
    assert not list(tmp_path.iterdir())
