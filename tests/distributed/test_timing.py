"""Time of a step in closed form, against hand-worked ones."""

from dataclasses import replace

import pytest

from hasten.core.sections import Distributed, Step
from hasten.distributed.footprint import Footprint, Part, PerRow, Weight
from hasten.distributed.link import LARGE, SMALL, Link
from hasten.distributed.timing import Speeds, step_time

MB = 2**20
LINK = Link(latency_seconds=0.001, bytes_per_second=MB)
SPEEDS = Speeds(passes=PerRow(0.0, 3.0), update=1.0, link=LINK)


def layer(megabytes, begins=True):
    return Part(
        weights=(Weight(megabytes * MB, rows=1024, columns=megabytes * 256),),
        inside=True,
        begins=begins,
        flops=PerRow(0, 1e12),
        output=PerRow(0, MB),
    )


MODEL = Footprint(parts=(layer(4), layer(4)))


def seconds(spread, rows=4, step=None, speeds=SPEEDS, own=MODEL):
    return step_time(MODEL, own, spread, rows, step or Step(), speeds)


def test_a_ring_sends_all_but_an_nth_twice():
    link = Link(latency_seconds=0.0, bytes_per_second=100.0)
    assert link.all_reduce(400, 4) == pytest.approx(2 * 3 / 4 * 400 / 100)
    assert link.gather(400, 4) == pytest.approx(3 / 4 * 400 / 100)
    assert link.all_reduce(400, 1) == 0
    assert Link.declared(200).bytes_per_second == 25e6


def test_latency_and_rate_are_found_from_two_messages():
    times = {num_bytes: LINK.all_reduce(num_bytes, 2) for num_bytes in (SMALL, LARGE)}
    found = Link.through(times, 2)
    assert found.latency_seconds == pytest.approx(LINK.latency_seconds)
    assert found.bytes_per_second == pytest.approx(LINK.bytes_per_second)


def test_one_process_only_calculates():
    found = seconds(Distributed())
    assert (found.passes, found.update, found.communication, found.waiting) == (12.0, 1.0, 0.0, 0.0)


def test_ddp_hides_what_is_sent_while_the_backward_pass_goes_on():
    # Two rows each: 6 s, of which the backward pass is 4. After 2 s the last layer's 4 MB are there and take 4 s; those
    # of the first follow, and end 6 s after the backward pass.
    free = replace(SPEEDS, link=Link(latency_seconds=0.0, bytes_per_second=MB))
    found = seconds(Distributed(kind="ddp", devices=2, bucket_mb=4), speeds=free)
    assert found.passes == 6
    assert found.communication == pytest.approx(2 + 4 + 4 - 4)
    half = seconds(Distributed(kind="ddp", devices=2, bucket_mb=4, compression="bfloat16"), speeds=free)
    assert half.communication == pytest.approx(4 + 2 - 4)


def test_low_rank_gradients_take_three_small_messages_and_their_own_arithmetic():
    spread = Distributed(kind="ddp", devices=2, compression="powersgd", powersgd_rank=2, bucket_mb=100)
    found = seconds(spread, speeds=replace(SPEEDS, low_rank=0.5))
    # Nearly nothing is sent, but PyTorch's first bucket holds one layer, so that there are two.
    thin = 2 * 4 * 2 * (1024 + 4 * 256) / MB
    assert found.communication == pytest.approx(2 * 3 * 2 * LINK.latency_seconds + thin)
    assert found.passes == 6 + 0.5


def test_fsdp_collects_twice_and_reduces_once():
    free = replace(SPEEDS, link=Link(latency_seconds=0.0, bytes_per_second=MB))
    found = seconds(Distributed(kind="fsdp", devices=2, shards=2), speeds=free)
    assert found.communication == pytest.approx(2 * 8 / 2 + 8)
    assert found.update == 0.5
    kept = seconds(Distributed(kind="fsdp", devices=2, shards=2, reshard=False), speeds=free)
    assert kept.communication == pytest.approx(8 / 2 + 8)


def test_tensor_parallelism_sums_activations_and_divides_the_arithmetic():
    halves = tuple(replace(part, flops=PerRow(0, 5e11), summed=PerRow(0, 2 * MB), num_summed=2) for part in MODEL.parts)
    free = replace(SPEEDS, link=Link(latency_seconds=0.0, bytes_per_second=MB))
    spread = Distributed(kind="tensor", devices=2, tensor=2)
    found = step_time(MODEL, Footprint(parts=halves), spread, 4, Step(), free)
    assert found.passes == pytest.approx(6)
    assert found.communication == pytest.approx(2 * 2 * 4)


def test_a_pipeline_waits_for_its_filling_and_draining():
    spread = Distributed(kind="pipeline", devices=2, pipeline=2)
    fast = replace(SPEEDS, link=Link(latency_seconds=0.0, bytes_per_second=1e15))
    found = seconds(spread, rows=4, step=Step(micro_batches=4), speeds=fast)
    assert found.passes == pytest.approx(6)  # half of 12
    assert found.waiting == pytest.approx(6 / 4)  # 1 of 5 micro-batches' time
    assert found.update == 0.5


def test_processes_that_share_cores_slow_one_another():
    assert seconds(Distributed(kind="ddp", devices=2), speeds=replace(SPEEDS, crowding=2.0)).passes == 12
