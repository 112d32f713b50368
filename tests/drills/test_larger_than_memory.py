"""Rows that the memory does not hold train a model, and a kill in the middle of an epoch loses and repeats none."""

from __future__ import annotations

import signal
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import larger_than_memory

    return larger_than_memory


@pytest.mark.slow
def test_a_training_that_was_killed_in_an_epoch_sees_every_row_as_often(
    larger_than_memory: ModuleType, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    larger_than_memory.generate(rows, 3000)
    whole, killed = (
        larger_than_memory.Training(
            rows=rows,
            folder=tmp_path / name,
            batch_size=16,
            checkpoint_seconds=0.05,
            overrides=("trainer.threads=1", "loader.order=blocks", "loader.block_rows=8", "loader.window_blocks=16"),
        )
        for name in ("whole", "killed")
    )
    whole.run()
    noted = larger_than_memory.Notes.of(whole.notes)
    assert len(noted.rows) == 2 * 180
    assert max(noted.seen.values()) == 2

    assert larger_than_memory.watched(killed.command(), die_at=270).code == -signal.SIGKILL
    assert not killed.outcome.exists()
    killed.run()
    resumed = larger_than_memory.compare(whole, killed, died_at=270)
    assert 180 < resumed.at <= 270, "it did not go on in the middle of the second epoch"
    assert resumed.same_rows
    assert resumed.same_steps
    assert resumed.same_weights


@pytest.mark.drill
def test_six_gigabytes_train_within_one_and_a_half_gibibytes(
    larger_than_memory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        larger_than_memory.main(["--folder", str(tmp_path)])
