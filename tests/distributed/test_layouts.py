"""Which layouts `distributed=auto` weighs."""

import pytest

from hasten.core.errors import ConfigError
from hasten.core.sections import Distributed
from hasten.distributed.layouts import layouts


def told(devices, typed=(), micro_batches=1, **knobs):
    auto = Distributed(kind="auto", devices=devices, **knobs)
    return [layout.told for layout in layouts(auto, devices, typed, micro_batches=micro_batches)]


def test_two_processes():
    assert told(2) == [
        "single",
        "ddp",
        "ddp bfloat16",
        "fsdp",
        "tensor",
        "pipeline 1F1B micro_batches=4",
        "pipeline Interleaved1F1B micro_batches=4",
    ]


def test_four_processes_are_combined():
    found = told(4)
    assert "fsdp replicas=2 shards=2" in found
    assert "hybrid shards=2 tensor=2" in found
    assert "hybrid pipeline=2 tensor=2 1F1B micro_batches=4" in found
    assert "hybrid pipeline=2 shards=2 1F1B micro_batches=4" in found
    assert len(found) == len(set(found))


def test_one_process_is_alone():
    assert told(1) == ["single"]


def test_what_is_typed_stays():
    assert told(4, ["tensor"], tensor=2) == [
        "hybrid tensor=2 replicas=2".replace("tensor=2 replicas=2", "replicas=2 tensor=2"),
        "hybrid shards=2 tensor=2",
        "hybrid pipeline=2 tensor=2 1F1B micro_batches=4",
        "hybrid pipeline=2 tensor=2 Interleaved1F1B micro_batches=4",
    ]
    assert told(2, ["shards"], shards=0) == ["fsdp"]
    assert told(2, ["compression"], compression="powersgd") == []
    assert {text for text in told(2, ["schedule"], schedule="GPipe") if "pipeline" in text} == {
        "pipeline GPipe micro_batches=4"
    }


def test_nothing_that_changes_what_is_learned_is_taken_by_itself():
    auto = Distributed(kind="auto", devices=4)
    found = [layout.spread for layout in layouts(auto, 4, (), micro_batches=1)]
    assert {spread.compression for spread in found} == {"none", "bfloat16"}
    assert {spread.average_every for spread in found} == {1}


def test_overrides_state_the_layout_and_keep_what_was_typed():
    auto = Distributed(kind="auto", devices=2, timeout_seconds=9.0)
    found = {it.told: it for it in layouts(auto, 2, ["timeout_seconds"], micro_batches=1)}
    overrides = found["pipeline 1F1B micro_batches=4"].overrides({"timeout_seconds": 9.0}, 1)
    assert overrides[0] == "distributed=pipeline"
    assert set(overrides[1:]) == {
        "distributed.timeout_seconds=9.0",
        "distributed.devices=2",
        "distributed.pipeline=2",
        "distributed.schedule=1F1B",
        "trainer.micro_batches=4",
    }


def test_a_number_of_processes_is_left_open_to_auto_alone():
    assert Distributed(kind="auto", devices=0).devices == 0
    with pytest.raises(ConfigError, match=r"distributed\.devices=0 leaves their number to distributed=auto"):
        Distributed(kind="ddp", devices=0)
