"""Rows prepared in several processes, killed and gone on with: the same bytes, whatever happened on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hasten.artefacts.rows import take
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Silent, Table
from hasten.data import prepare
from hasten.data.parquet import Parquet
from hasten.data.preparers import Preparers
from hasten.data.transforms import Reshape, Standardize
from hasten.tasks.classification import Classification

SHARES = {"train": 0.5, "validate": 0.25, "test": 0.25}
NUM_ROWS = 10_000


def table() -> Table:
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(NUM_ROWS, 6), dtype=np.uint8)
    return Table(inputs={"x": pixels}, targets=np.arange(NUM_ROWS) % 4)


class Killed(BaseException):
    pass


class Fatal(Silent):
    """Ends the work after the first shard, as a kill does: nothing tidies up."""

    def advance(self, steps: int = 1) -> None:
        raise Killed


def written(folder: Path, rows=None, **knobs) -> prepare.Prepared:
    folder.mkdir(exist_ok=True)
    given = {"task": Classification(), "shares": SHARES, "seed": 0, "normalize": True, "source": "abc"}
    given |= {"transforms": [Reshape(column="x", shape=(2, 3))], "processes": 1}
    return prepare.write(folder, rows or table(), **given | knobs)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_processes_write_the_bytes_of_one(tmp_path):
    written(tmp_path / "one")
    written(tmp_path / "two", processes=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_goes_on_from_finished_shards_with_the_same_bytes(tmp_path, monkeypatch):
    written(tmp_path / "whole")
    with pytest.raises(Killed):
        written(tmp_path / "killed", progress=Fatal())
    made = []
    make = prepare.Job.make
    monkeypatch.setattr(prepare.Job, "make", lambda job, shard: made.append(shard.number) or make(job, shard))
    written(tmp_path / "killed")
    assert made == [1, 2]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_shard_whose_bytes_were_lost_is_made_again(tmp_path):
    written(tmp_path / "whole")
    with pytest.raises(Killed):
        written(tmp_path / "killed", progress=Fatal())
    file = tmp_path / "killed" / "resume" / "train-column-0.npy"
    damaged = bytearray(file.read_bytes())
    damaged[200] ^= 1
    file.write_bytes(damaged)
    written(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_error_in_a_process_is_the_error_of_the_transform(tmp_path):
    narrow = Standardize(mean={"x": [0.0]}, std={"x": [1.0]})
    with pytest.raises(ConfigError, match=r"^Standardize wants 1 features or channels along axis 1 of the column x"):
        written(tmp_path / "data", transforms=[narrow], normalize=False, processes=2)


def test_pixels_are_kept_as_they_are_and_standardised_when_they_are_taken(tmp_path):
    prepared = written(tmp_path / "data")
    kept, whole = prepared.kept("train"), prepared.rows("train")
    assert kept.inputs["x"].dtype == np.uint8
    numbers = np.array([7, 3, 3, 4999])
    some = take(kept, numbers)
    assert some.deferred == ()
    np.testing.assert_array_equal(some.inputs["x"], whole.inputs["x"][numbers])
    np.testing.assert_array_equal(some.targets, whole.targets[numbers])
    np.testing.assert_allclose(whole.inputs["x"].mean((0, 2)), 0, atol=1e-5)


def test_rows_of_the_source_give_what_the_files_give(tmp_path):
    rows = table()
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": rows.inputs["x"].tolist(), "label": rows.targets}), file, row_group_size=700)
    source = Parquet(path=str(file))
    prepared = written(tmp_path / "data", source.stream())
    raw, whole = prepared.raw("test", source), prepared.rows("test")
    np.testing.assert_array_equal(take(raw, slice(None)).inputs["x"], whole.inputs["x"])
    np.testing.assert_array_equal(raw.targets, whole.targets)
    loaded = written(tmp_path / "loaded", source.load())
    assert loaded.test == prepared.test
    assert content(tmp_path / "data") == content(tmp_path / "loaded")


def test_a_process_that_is_killed_ends_the_stage_in_one_line_and_what_is_finished_is_kept(tmp_path, monkeypatch):
    answer = Preparers._answer

    def killed(self, process):
        first = answer(self, process)
        for each in self._processes:
            each.kill()
        return first

    with monkeypatch.context() as patch:
        patch.setattr(Preparers, "_answer", killed)
        with pytest.raises(HastenError, match=r"^data: a process .* died of signal SIGKILL"):
            written(tmp_path / "killed", processes=2)
    written(tmp_path / "killed")
    written(tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
