"""Checkpoints that survive a kill at any moment."""

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.core.errors import HastenError
from hasten.training.checkpoint import DurableCheckpoints, newest

STATE = {"identity": "mine", "weights": torch.arange(20.0), "curves": {"lr": [0.1]}, "generator": (3, (1, 2), None)}


def save(folder, step, identity="mine"):
    file = folder / f"step={step}.ckpt"
    DurableCheckpoints().save_checkpoint(STATE | {"identity": identity}, file)
    return file


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_reads_what_it_wrote(tmp_path):
    read = DurableCheckpoints().load_checkpoint(save(tmp_path / "new", 1))
    assert torch.equal(read.pop("weights"), STATE["weights"])
    assert read == {name: value for name, value in STATE.items() if name != "weights"}
    assert names(tmp_path / "new") == ["step=1.ckpt"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_notices_any_flipped_bit_and_any_missing_end(tmp_path, data):
    file = save(tmp_path, 1)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    file.write_bytes(content)
    with pytest.raises(HastenError, match=r"step=1\.ckpt is torn"):
        DurableCheckpoints().load_checkpoint(file)


def test_never_runs_what_a_checkpoint_carries(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    file = tmp_path / "step=1.ckpt"
    DurableCheckpoints().save_checkpoint({"identity": "mine", "payload": Attack()}, file)
    with pytest.raises(Exception, match="Weights only load failed"):
        DurableCheckpoints().load_checkpoint(file)


def test_finds_the_latest_step_by_number(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert newest(tmp_path, "mine") == tmp_path / "step=100.ckpt"
    assert names(tmp_path) == ["step=10.ckpt", "step=100.ckpt"]


def test_goes_back_to_the_one_before_where_the_latest_is_torn(tmp_path):
    kept, torn = save(tmp_path, 4), save(tmp_path, 8)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert newest(tmp_path, "mine") == kept
    assert names(tmp_path) == ["step=4.ckpt"]


def test_starts_afresh_where_all_are_torn_or_there_is_none(tmp_path):
    assert newest(tmp_path / "nowhere", "mine") is None
    save(tmp_path, 1).write_bytes(io.BytesIO().getvalue())
    assert newest(tmp_path, "mine") is None
    assert names(tmp_path) == []


def test_never_resumes_another_training(tmp_path):
    save(tmp_path, 5, identity="other")
    mine = save(tmp_path, 3)
    assert newest(tmp_path, "mine") == mine


def test_sweeps_away_what_a_kill_left_half_written(tmp_path):
    (tmp_path / "step=2.ckpt.partial").write_bytes(b"half")
    file = save(tmp_path, 1)
    assert newest(tmp_path, "mine") == file
    assert names(tmp_path) == ["step=1.ckpt"]
