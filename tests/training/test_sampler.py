"""Which rows make up which batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.training.sampler import Batches, ResumableBatches


def batches(num_rows, batch_size, *, epoch=0, done=0, seed=0, rank=0, world_size=1):
    return list(ResumableBatches(num_rows, batch_size, seed, lambda: (epoch, done), rank, world_size))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_an_epoch_visits_no_row_twice_and_leaves_out_less_than_a_batch(num_rows, batch_size, epoch):
    batch_size = min(batch_size, num_rows)
    visited = [row for batch in batches(num_rows, batch_size, epoch=epoch) for row in batch]
    assert len(visited) == len(set(visited)) == num_rows // batch_size * batch_size
    assert set(visited) <= set(range(num_rows))


@given(st.integers(0, 10), st.integers(0, 3))
def test_goes_on_where_the_training_stands(done, epoch):
    whole = batches(43, 4, epoch=epoch)
    assert batches(43, 4, epoch=epoch, done=done) == whole[done:]


def test_a_finished_epoch_has_nothing_left():
    assert batches(43, 4, done=10) == []


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3))
def test_any_number_of_processes_shares_the_same_global_batches(world_size, done):
    alone = batches(50, 12, done=done)
    shared = [batches(50, 12, done=done, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shared]
        assert {len(part) for part in parts} == {12 // world_size}
        assert sorted(row for part in parts for row in part) == sorted(batch)


def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    orders = {(epoch, seed): str(batches(40, 40, epoch=epoch, seed=seed)) for epoch in range(3) for seed in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == str(batches(40, 40, epoch=2, seed=1))


def test_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    batches(10, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_refuses_a_batch_that_can_not_be_filled_or_shared_out():
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 3\], the number of rows, got 4"):
        batches(3, 4)
    with pytest.raises(ValueError, match="batch_size 4 can't be shared out evenly among 3 processes"):
        batches(8, 4, world_size=3)


def test_gathers_a_whole_batch_of_every_tensor_at_once():
    data = Batches(torch.arange(10) * 1.5, torch.arange(10))
    values, numbers = data.__getitems__([7, 2])
    assert (values.tolist(), numbers.tolist(), len(data)) == ([10.5, 3.0], [7, 2], 10)
