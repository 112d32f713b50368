"""Which rows make up which batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.training.sampler import Blocks, ResumableBatches, order

ORDERS = [None, Blocks(rows=4, window=3), Blocks(rows=1, window=1), Blocks(rows=100, window=2)]


def batches(num_rows, batch_size, *, epoch=0, done=0, seed=0, blocks=None, rank=0, world_size=1, parts=1):
    position = epoch, done
    sampler = ResumableBatches(
        num_rows, batch_size, seed, lambda: position, blocks=blocks, rank=rank, world_size=world_size, parts=parts
    )
    return [batch.tolist() for batch in sampler]


def visited(num_rows, blocks, **more):
    return np.concatenate(list(order(num_rows, 0, 0, blocks, **more)))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.sampled_from(ORDERS))
def test_an_epoch_visits_no_row_twice_and_leaves_out_less_than_a_batch(num_rows, batch_size, epoch, blocks):
    batch_size = min(batch_size, num_rows)
    rows = [row for batch in batches(num_rows, batch_size, epoch=epoch, blocks=blocks) for row in batch]
    assert len(rows) == len(set(rows)) == num_rows // batch_size * batch_size
    assert set(rows) <= set(range(num_rows))


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 8))
def test_in_blocks_too_every_row_comes_once(num_rows, rows, window):
    assert sorted(visited(num_rows, Blocks(rows=rows, window=window))) == list(range(num_rows))


def test_a_window_is_of_whole_blocks_and_mixes_their_rows():
    blocks = Blocks(rows=8, window=4)
    windows = list(order(100, 0, 0, blocks))
    assert [len(window) for window in windows[:-1]] in ([32, 32, 32], [32, 32, 28], [32, 28, 32], [28, 32, 32])
    for window in windows:
        drawn_from = {row // 8 for row in window}
        assert sorted(window) == [row for row in range(100) if row // 8 in drawn_from]
        assert len(drawn_from) <= 4
    mixed = [len({row // 8 for row in window[:8]}) for window in windows[:3]]
    assert min(mixed) > 1


def test_a_window_of_all_blocks_leaves_no_trace_of_them():
    # Of a uniform permutation two rows that follow one another are of one block of 10 with a chance of 9 / 199.
    epochs = [np.concatenate(list(order(200, 0, epoch, Blocks(rows=10, window=20)))) // 10 for epoch in range(100)]
    share = np.mean([np.mean(epoch[1:] == epoch[:-1]) for epoch in epochs])
    assert share == pytest.approx(9 / 199, abs=5 * np.sqrt(9 / 199 / (199 * 100)))


@given(st.integers(0, 10), st.integers(0, 3), st.sampled_from(ORDERS))
def test_goes_on_where_the_training_stands(done, epoch, blocks):
    whole = batches(43, 4, epoch=epoch, blocks=blocks)
    assert batches(43, 4, epoch=epoch, done=done, blocks=blocks) == whole[done:]


@given(st.integers(0, 43), st.sampled_from(ORDERS))
def test_what_is_skipped_changes_nothing_of_the_rest(skip, blocks):
    pieces = list(order(43, 0, 0, blocks, skip=skip))
    rest = np.concatenate([np.empty(0, np.int64), *pieces])
    assert rest.tolist() == visited(43, blocks)[skip:].tolist()


def test_a_finished_epoch_has_nothing_left():
    assert batches(43, 4, done=10) == []


def test_any_after_any_is_a_permutation_of_torchs_under_a_seed_of_each_epoch():
    # What results have rested on since there are results.
    generator = torch.Generator().manual_seed(7)
    seeds = torch.randint(2**62, (3,), generator=generator)
    expected = torch.randperm(12, generator=generator.manual_seed(int(seeds[2]))).tolist()
    assert batches(12, 12, seed=7, epoch=2) == [expected]


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), st.sampled_from(ORDERS))
def test_any_number_of_processes_shares_the_same_global_batches(world_size, done, blocks):
    alone = batches(50, 12, done=done, blocks=blocks)
    shared = [batches(50, 12, done=done, blocks=blocks, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shared]
        assert {len(part) for part in parts} == {12 // world_size}
        assert sorted(row for part in parts for row in part) == sorted(batch)


@pytest.mark.parametrize("blocks", [None, Blocks(rows=4, window=3)])
def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else(blocks):
    def once(epoch, seed):
        return str(batches(40, 40, epoch=epoch, seed=seed, blocks=blocks))

    orders = {(epoch, seed): once(epoch, seed) for epoch in range(3) for seed in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == once(2, 1)


@pytest.mark.parametrize("blocks", [None, Blocks(rows=4, window=3)])
def test_leaves_the_global_generator_alone(blocks):
    state = torch.get_rng_state()
    batches(10, 2, blocks=blocks)
    assert torch.equal(state, torch.get_rng_state())


def test_every_process_has_its_share_of_every_part_of_a_batch_whatever_the_sizes():
    [whole], size, num_parts = batches(11, 11), 3, 2
    shared = [batches(11, 11, rank=rank, world_size=size, parts=num_parts)[0] for rank in range(size)]
    halves = np.array_split(whole, num_parts)
    for rank, rows in enumerate(shared):
        assert rows == [*halves[0][rank::size], *halves[1][rank::size]]
    assert sorted(row for rows in shared for row in rows) == sorted(whole)


def test_refuses_a_batch_that_can_not_be_filled_or_shared_out():
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 3\], the number of rows, got 4"):
        batches(3, 4)
    with pytest.raises(ValueError, match="batch_size 4 has no row for each of 3 processes x 2 parts"):
        batches(8, 4, world_size=3, parts=2)
