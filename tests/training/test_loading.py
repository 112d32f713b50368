"""How rows reach a training."""

import multiprocessing
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from hasten.core.interfaces import Rows, Transform
from hasten.core.sections import Loader
from hasten.training import loading
from hasten.training.batches import Batches
from hasten.training.cache import cached, resolved
from hasten.training.loading import BatchLoader, Readings, sparing
from hasten.training.sampler import Blocks, ResumableBatches

NUM_ROWS, BATCH = 43, 4
BLOCKS = Blocks(rows=5, window=3)
PLAIN = Loader(ahead=0)
WAYS = {
    "a gather": PLAIN,
    "a gather ahead": Loader(ahead=2),
    "row by row": Loader(row_by_row=True, ahead=0),
    "row by row ahead": Loader(row_by_row=True, ahead=2),
    "a worker": Loader(workers=1, ahead=2),
    "a worker that is never ahead": Loader(workers=1, ahead=0),
    "two workers row by row": Loader(row_by_row=True, workers=2, ahead=1),
}


@dataclass(frozen=True, kw_only=True)
class Halve(Transform):
    elementwise = True

    def __call__(self, columns):
        return {name: values.astype(np.float32) / 2 for name, values in columns.items()}


@dataclass(frozen=True, kw_only=True)
class Lengths(Transform):
    """Of texts or bytes: what only a transform makes numbers of."""

    def __call__(self, columns):
        return {"length": np.array([[len(text)] for text in columns["text"]], dtype=np.int64)}


def kept(folder, number=NUM_ROWS):
    """Mapped bytes of which a transform makes floats; the first pixel tells the row."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, 3, 4), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(number)
    np.save(folder / "pixels.npy", pixels)
    mapped = np.load(folder / "pixels.npy", mmap_mode="r")
    return Rows(inputs={"input": mapped}, targets=np.arange(number), deferred=(Halve(),))


def load(rows, loader=PLAIN, *, blocks=None, done=0, answers=None, numbers=None):
    """Batches of what is left of epoch 1, and the readings."""
    batches = Batches(rows, answers, numbers)
    order = ResumableBatches(len(batches), BATCH, 5, lambda: (1, done), blocks=blocks)
    with BatchLoader(batches, order, loader, pin=False) as loaded:
        return list(loaded), loaded.readings


def assert_same(one, other):
    assert len(one) == len(other)
    for batch, again in zip(one, other, strict=True):
        assert [values.dtype for values in batch] == [values.dtype for values in again]
        assert all(torch.equal(values, same) for values, same in zip(batch, again, strict=True))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["rows", "blocks"])
@pytest.mark.parametrize("way", WAYS)
def test_the_batches_are_the_same_whoever_fetches_them(tmp_path, way, blocks):
    rows, answers = kept(tmp_path), np.random.default_rng(1).normal(size=(NUM_ROWS, 2)).astype(np.float32)
    batches, _ = load(rows, WAYS[way], blocks=blocks, answers=answers)
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (1, 0), blocks=blocks)
    expected = [
        tuple(
            torch.from_numpy(values[numbers])
            for values in (np.asarray(rows.inputs["input"]).astype(np.float32) / 2, rows.targets, answers)
        )
        for numbers in order
    ]
    assert_same(batches, expected)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["rows", "blocks"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_of_an_epoch_is_what_was_not_taken(tmp_path, way, blocks):
    """However far ahead the loader was: the position is that of the training."""
    rows, taken = kept(tmp_path), []
    steps = 0
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (1, steps), blocks=blocks)
    whole, _ = load(rows, blocks=blocks)
    with BatchLoader(Batches(rows), order, WAYS[way], pin=False) as loaded:
        for part in (3, 1, 20):
            for batch, _ in zip(loaded, range(part), strict=False):
                taken.append(batch)
                steps += 1
            # As a training that stops does, `zip` may have asked for one more than it took a step with.
    assert_same(taken, whole)


def test_one_loader_gives_epoch_after_epoch(tmp_path):
    epoch = 0
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (epoch, 0))
    for way in ("a gather ahead", "a worker"):
        with BatchLoader(Batches(kept(tmp_path)), order, WAYS[way], pin=False) as loaded:
            seen = []
            for epoch in range(3):  # noqa: B007  # the position asks for it
                seen.append([row for _, targets in loaded for row in targets.tolist()])
        assert len({str(rows) for rows in seen}) == 3
        assert {len(set(rows)) for rows in seen} == {NUM_ROWS // BATCH * BATCH}


@pytest.mark.parametrize("cache", ["auto", "memory", "disk", "none"])
def test_the_batches_are_the_same_wherever_rows_are_kept(tmp_path, cache):
    rows = kept(tmp_path)
    where, _ = cached(rows, cache)
    assert_same(load(where)[0], load(rows)[0])


def test_rows_are_copied_once_where_memory_is_the_cache(tmp_path):
    rows = kept(tmp_path)
    where, told = cached(rows, "memory")
    np.memmap(tmp_path / "pixels.npy", mode="r+")[-NUM_ROWS * 12 :] = 0
    assert int(rows.inputs["input"].sum()) == 0
    assert where.inputs["input"][-1, 0, 0] == (NUM_ROWS - 1) / 2
    assert told.startswith("0 MB of training rows are kept in memory as a model takes them: they fit into 25% of what")
    again, told = cached(where, "memory")
    assert again.inputs["input"] is where.inputs["input"]
    assert told == "0 MB of training rows are held by the process"


SIZE = NUM_ROWS * (12 + 8)
"""Of the kept rows, bytes and targets."""


@pytest.mark.parametrize(
    ("cache", "free", "expected", "dtype"),
    [
        ("auto", 4 * NUM_ROWS * (4 * 12 + 8), "kept in memory as a model takes them: they fit into 25%", np.float32),
        ("auto", 4 * NUM_ROWS * (4 * 12 + 8) - 1, "kept in memory: they fit into 25%", np.uint8),
        ("auto", 4 * SIZE, "kept in memory: they fit into 25%", np.uint8),
        ("auto", 4 * SIZE - 1, "read from mapped files: they do not fit into 25%", np.uint8),
        ("auto", None, "read from mapped files: they do not fit into 25% of what is free, unknown", np.uint8),
        ("memory", 0, "kept in memory: loader.cache=memory", np.uint8),
        ("disk", 10**12, "read from mapped files: loader.cache=disk", np.uint8),
    ],
)
def test_memory_takes_what_fits_and_no_transform_twice_where_its_result_fits(
    tmp_path, monkeypatch, cache, free, expected, dtype
):
    monkeypatch.setattr("hasten.training.cache.free_bytes", lambda: free)
    rows = mapped_targets(kept(tmp_path), tmp_path)
    where, told = cached(rows, cache)
    assert expected in told
    assert where.inputs["input"].dtype == dtype
    assert_same(load(where)[0], load(rows)[0])


def mapped_targets(rows, folder):
    np.save(folder / "targets.npy", rows.targets)
    return replace(rows, targets=np.load(folder / "targets.npy", mmap_mode="r"))


def test_a_thread_is_left_out_where_it_would_take_a_core_from_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.training.loading.num_cores", lambda: 2)
    mapped = kept(tmp_path)
    memory, _ = cached(mapped, "memory")
    assert sparing(Loader(), memory, 2, "cpu").ahead == 0
    for rows, threads, accelerator in ((memory, 1, "cpu"), (memory, 2, "cuda"), (mapped, 2, "cpu")):
        assert sparing(Loader(), rows, threads, accelerator) == Loader()
    assert sparing(Loader(workers=1), memory, 2, "cpu") == Loader(workers=1)


def test_the_automatic_order_goes_by_the_size_of_the_rows(tmp_path):
    rows = kept(tmp_path)
    size = (rows.inputs["input"].nbytes + rows.targets.nbytes) / 1e6
    assert resolved(Loader(blocks_above_mb=size), rows).order == "rows"
    assert resolved(Loader(blocks_above_mb=size * 0.999), rows).order == "blocks"
    assert resolved(Loader(order="rows", blocks_above_mb=0), rows).order == "rows"


@pytest.mark.parametrize("way", ["a gather", "row by row"])
def test_texts_are_transformed_whenever_they_are_read(way):
    texts = np.array(["a" * length for length in range(NUM_ROWS)], dtype=object)
    rows = Rows(inputs={"text": texts}, targets=np.arange(NUM_ROWS), deferred=(Lengths(),))
    batches, readings = load(rows, WAYS[way])
    assert all(torch.equal(lengths[:, 0], targets) for lengths, targets in batches)
    assert batches[0][0].dtype == torch.int64
    mean = (sum(range(NUM_ROWS)) + 8 * NUM_ROWS) / NUM_ROWS
    assert readings[0].asked_bytes == pytest.approx(10 * BATCH * mean, rel=0.01)


def test_a_part_of_the_rows_is_all_that_is_read(tmp_path):
    part = np.arange(3, NUM_ROWS, 2)
    batches, _ = load(kept(tmp_path), numbers=part)
    seen = [row for _, targets in batches for row in targets.tolist()]
    assert len(set(seen)) == len(seen) == len(part) // BATCH * BATCH
    assert set(seen) <= set(part.tolist())


def running():
    """Threads and processes of loaders; a queue's own thread takes a moment to see that it is closed."""
    threads = [thread.name for thread in threading.enumerate() if thread.name == "batches ahead"]
    return threads + multiprocessing.active_children()


class Broken(Halve):
    def __call__(self, columns):
        raise ZeroDivisionError("this row can't be halved")


@pytest.mark.parametrize("way", WAYS)
def test_what_goes_wrong_is_told_and_nothing_is_left_running(tmp_path, way):
    with pytest.raises(ZeroDivisionError, match="this row can't be halved"):
        load(replace(kept(tmp_path), deferred=(Broken(),)), WAYS[way])
    assert running() == []


@pytest.mark.parametrize("way", WAYS)
def test_whoever_leaves_early_leaves_nothing_running(tmp_path, way):
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (0, 0))
    with BatchLoader(Batches(kept(tmp_path)), order, WAYS[way], pin=False) as loaded:
        next(iter(loaded))
        assert loaded.readings == []
    assert running() == []
    assert loaded.readings[0].num_batches == 1


def test_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    for way in ("a gather ahead", "a worker"):
        load(kept(tmp_path), WAYS[way])
    assert torch.equal(state, torch.get_rng_state())


def test_tells_what_was_asked_for_before_the_last_step(tmp_path):
    rows = kept(tmp_path)
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (0, 0))
    with BatchLoader(Batches(rows), order, Loader(), pin=False) as loaded:
        batches = iter(loaded)
        for _ in range(10):
            next(batches)
        (reading,) = loaded.readings
    assert (reading.num_batches, reading.asked_bytes) == (10, 10 * BATCH * (12 + 8))
    assert reading.waited_seconds > 0
    assert loaded.readings == [reading]


def test_counts_what_storage_delivers(monkeypatch, tmp_path):
    counts = iter([1000, 1600, 1600])
    monkeypatch.setattr(loading, "delivered_bytes", lambda: next(counts))
    order = ResumableBatches(NUM_ROWS, BATCH, 5, lambda: (0, 0))
    with BatchLoader(Batches(kept(tmp_path)), order, PLAIN, pin=False) as loaded:
        for _ in range(2):
            list(loaded)
    assert [reading.read_bytes for reading in loaded.readings] == [600, 0]
    assert [reading.hit_rate for reading in loaded.readings] == [1 - 600 / 800, 1.0]


def test_more_read_than_asked_for_is_no_hit_and_the_unknown_is_none():
    reading = Readings(num_batches=1, waited_seconds=0.0, asked_bytes=100, read_bytes=4096)
    assert reading.hit_rate == 0.0
    assert replace(reading, read_bytes=None).hit_rate is None
