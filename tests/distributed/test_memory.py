"""Memory of a process in closed form: hand-worked models, and what has to be so whatever the model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import HastenError
from hasten.core.sections import Distributed, Step
from hasten.distributed.footprint import Footprint, Part, PerRow, Weight, deepened
from hasten.distributed.memory import cut, divided, in_flight, needed

STEP = Step()


def part(weight=0, saved=0.0, forward=0.0, backward=0.0, **knobs):
    """A stretch with one square weight of so many bytes, and so many bytes for each row."""
    weights = (Weight(weight, rows=8, columns=weight // 32),) if weight else ()
    lines = {"saved": saved, "forward": max(forward, saved), "backward": backward}
    return Part(weights=weights, **{name: PerRow(0, each) for name, each in lines.items()}, **knobs)


def model(*parts):
    total = sum(each.weight_bytes for each in parts)
    return Footprint(parts=parts, given_bytes=total)


TWO = model(
    part(320, saved=10, forward=15, backward=20, inside=True, begins=True, flops=PerRow(0, 1000), output=PerRow(0, 10)),
    part(640, saved=30, forward=30, backward=5, inside=True, begins=True, flops=PerRow(0, 1000), output=PerRow(0, 10)),
)


def test_one_process_has_weights_states_and_the_worse_of_passes_and_update():
    found = needed(TWO, Distributed(), 4, STEP)
    assert (found.given, found.weights, found.states) == (960, 960, 2 * 960)
    # Backward pass of the second: 4 x (10 + 5) and its gradient; of the first: 4 x 20 and both gradients.
    assert found.passes == max(4 * 40, 4 * 15 + 640, 4 * 20 + 960)
    assert found.update == 960
    assert found.peak == 4 * 960 + 4 * 20 + 960


def test_temporaries_of_the_optimizer_count_when_activations_are_gone():
    found = needed(replace(TWO, update_share=1.0), Distributed(), 4, STEP)
    assert found.update == 2 * 960
    assert found.peak == 4 * 960 + 2 * 960


def test_ddp_keeps_its_buckets_and_sees_its_share_of_the_rows():
    found = needed(TWO, Distributed(kind="ddp", devices=2), 8, STEP)
    assert found.gradients == 960
    assert found.passes == max(4 * 40, 4 * 15 + 640, 4 * 20 + 320)
    copied = needed(TWO, Distributed(kind="ddp", devices=2, bucket_views=False), 8, STEP)
    assert copied.gradients == 2 * 960


def test_compressed_gradients_are_beside_those_that_they_are_made_of():
    half = needed(TWO, Distributed(kind="ddp", devices=2, compression="bfloat16"), 8, STEP)
    assert half.passes == max(4 * 15 + 640 + 640 / 2, 4 * 20 + 320 + 960 / 2)
    low_rank = needed(TWO, Distributed(kind="ddp", devices=2, compression="powersgd", powersgd_rank=2), 8, STEP)
    thin = 2 * 4 * ((8 + 10) + (8 + 20))
    assert low_rank.communication == 960 + thin  # the error of every gradient, and two matrices for each


def test_shards_divide_what_lasts_and_blocks_are_collected_one_at_a_time():
    found = needed(TWO, Distributed(kind="fsdp", devices=4, shards=4), 16, STEP)
    assert (found.given, found.weights, found.states) == (960, 240, 480)
    assert found.update == 240
    # The second block's passes: its buffer and itself, what the first saved. Then its gradients are copied and summed.
    forward = 2 * 640 + 4 * 40
    backward = 640 + 320 + 4 * 15 + 640
    reducing = 320 + 4 * 10 + 3 * 640
    assert found.passes == max(forward, backward, reducing)


def test_rows_that_no_number_of_processes_divides_make_the_largest_shard():
    assert Weight(40, rows=10).shard_bytes(4) == 12
    assert Weight(4, rows=1).shard_bytes(4) == 4


def test_a_pipeline_keeps_activations_of_the_micro_batches_on_their_way():
    spread = Distributed(kind="pipeline", devices=2, pipeline=2, schedule="GPipe")
    all_at_once = needed(TWO, spread, 16, Step(micro_batches=4))
    in_turn = needed(TWO, replace(spread, schedule="1F1B"), 16, Step(micro_batches=4))
    # The process with the second stage: GPipe keeps 4 micro-batches of 4 rows, 1F1B one of the last stage.
    assert all_at_once.passes >= 4 * 4 * 30
    assert in_turn.passes < all_at_once.passes


def test_the_first_process_of_a_pipeline_has_copies_while_it_finds_out_where_to_cut():
    spread = Distributed(kind="pipeline", devices=2, pipeline=2)
    found = needed(TWO, spread, 16, Step(micro_batches=4))
    assert found.peak == found.before == 5 * 960 + 2 * 4 * 10 + (4 * 5 + 640)


@pytest.mark.parametrize(
    ("schedule", "process", "expected"),
    [("GPipe", 0, 8), ("1F1B", 0, 4), ("1F1B", 3, 1), ("Interleaved1F1B", 0, 11), ("ZBVZeroBubble", 2, 8)],
)
def test_micro_batches_in_flight(schedule, process, expected):
    assert in_flight(schedule, 4, process, 8) == expected


def test_cuts_give_the_least_work_to_the_process_that_has_most():
    pieces = [(part(flops=PerRow(0, work)),) for work in (1, 2, 3, 4, 5)]
    stages = divided(pieces, 2, 1)
    assert [[each.flops.each for each in stage] for stage in stages] == [[1, 2, 3], [4, 5]]
    assert divided(pieces, 6, 1) is None
    with pytest.raises(ValueError, match="5 parts can't be cut into 6 stages"):
        cut(Footprint(parts=tuple(each for (each,) in pieces)), 6, 1)


parts = st.builds(
    part,
    st.sampled_from([0, 32, 320, 3200]),
    saved=st.floats(0, 1e3),
    forward=st.floats(0, 1e3),
    backward=st.floats(0, 1e3),
    inside=st.just(True),
    begins=st.just(True),
)
models = st.lists(parts, min_size=1, max_size=8).map(lambda found: model(*found))


@given(models, st.integers(1, 64))
def test_more_shards_never_need_more(found, rows):
    def peak(shards):
        return needed(found, Distributed(kind="fsdp", devices=8, shards=shards), 8 * rows, STEP).peak

    assert peak(8) <= peak(4) <= peak(2)


@given(models, st.integers(1, 64), st.sampled_from(["ddp", "fsdp", "single"]))
def test_more_rows_never_need_less(found, rows, kind):
    spread = Distributed(kind=kind, devices=1 if kind == "single" else 4, shards=4 if kind == "fsdp" else 1)
    assert needed(found, spread, 4 * rows, STEP).peak <= needed(found, spread, 4 * rows + 4, STEP).peak


@given(models, st.integers(1, 16))
def test_more_processes_of_ddp_never_need_more(found, rows):
    peaks = [needed(found, Distributed(kind="ddp", devices=each), 8 * rows, STEP).peak for each in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_model_is_made_deeper_by_what_each_block_adds():
    first, block, last = part(32), [part(64, saved=1), part(saved=2)], part(128)
    shallow = model(first, *block * 2, last)
    deep = model(first, *block * 4, last)
    assert deepened(shallow, deep, 9) == model(first, *block * 9, last)


def test_blocks_that_differ_are_not_made_more_of():
    shallow, deep = model(part(32), part(64)), model(part(32), part(96), part(160), part(64))
    with pytest.raises(HastenError, match="is not the same"):
        deepened(shallow, deep, 9)
