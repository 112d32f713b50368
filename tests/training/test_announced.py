"""Rows that are wanted soon are told to the system, and only rows that lie in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hasten.core.interfaces import Rows
from hasten.training import announced
from hasten.training.announced import Announced
from hasten.training.batches import Batches
from hasten.training.sampler import Blocks, ResumableBatches, order

ROWS = 500


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """(500, 700) numbers, so that rows begin anywhere within a page."""
    np.save(tmp_path / "rows.npy", np.arange(ROWS * 700, dtype=np.float32).reshape(ROWS, 700))
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


def test_runs_of_neighbours_are_announced_from_page_to_page(
    mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(announced, "_will_need", lambda values, first, end: told.append((first, end)))
    Announced.of([mapped])(np.array([7, 3, 5, 4, 499, 6, 100]))
    assert told == [(3, 8), (100, 101), (499, 500)]


def test_every_row_may_be_announced_wherever_it_lies(mapped: np.ndarray) -> None:
    announce = Announced.of([mapped])
    for rows in (np.array([0]), np.array([ROWS - 1]), np.arange(ROWS), np.array([], dtype=np.int64)):
        announce(rows)
    assert mapped[ROWS - 1, -1] == ROWS * 700 - 1


def test_what_lies_in_memory_is_left_alone(mapped: np.ndarray) -> None:
    announce = Announced.of([np.zeros((4, 2)), mapped])
    assert [values is mapped for values in announce.columns] == [True]


def test_what_would_crowd_out_the_rest_is_not_announced(mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(announced, "_will_need", lambda values, first, end: told.append(first))
    monkeypatch.setattr(announced, "free_bytes", lambda: 4 * 2800 * 10)  # a quarter of it holds ten rows
    announce = Announced.of([mapped])
    announce(np.arange(11))
    assert told == []
    announce(np.arange(10))
    assert told == [0]


def test_each_window_is_announced_before_its_first_batch(mapped: np.ndarray) -> None:
    windows: list[list[int]] = []
    blocks = Blocks(rows=10, window=5)
    batches = ResumableBatches(
        ROWS, 20, 3, lambda: (1, 4), blocks=blocks, announce=lambda rows: windows.append(sorted(rows.tolist()))
    )
    seen: list[int] = []
    for batch in batches:
        seen += batch.tolist()
        assert set(seen) <= {row for window in windows for row in window}
    expected = [sorted(piece.tolist()) for piece in order(ROWS, 3, 1, blocks, skip=80)]
    assert windows == expected


def test_batches_are_the_same_with_it(mapped: np.ndarray) -> None:
    batches = Batches(Rows(inputs={"input": mapped}, targets=np.zeros(ROWS, np.int64)))
    numbers = np.array([4, 400, 2])
    before = batches.__getitems__(numbers)
    batches.announced()(numbers)
    after = batches.__getitems__(numbers)
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
