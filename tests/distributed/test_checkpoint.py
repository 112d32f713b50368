"""What is kept of a training in several processes is enough to go on from, in any arrangement of them."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from hasten.core.errors import HastenError
from hasten.core.files import read_json, write_json
from hasten.core.interpreter import import_path
from hasten.core.sections import Distributed
from hasten.distributed.checkpoint import read_weights
from hasten.distributed.group import joined

JOBS = Path(__file__).with_name("jobs.py")
sys.path.insert(0, str(JOBS.parent))
import jobs  # noqa: E402
from jobs import Job  # noqa: E402

sys.path.remove(str(JOBS.parent))

TWO = {"kind": "ddp", "devices": 2}
FSDP = {"kind": "fsdp", "devices": 2, "shards": 0}
POWERSGD = TWO | {"bucket_mb": 0.001, "compression": "powersgd", "powersgd_rank": 2, "powersgd_start": 3}
APART = TWO | {"average_every": 4}
STOP = 14
PAIR = [
    Job(name="normalized", model="normalized"),
    Job(name="normalized half", model="normalized", stop=STOP),
    Job(name="normalized rest", model="normalized", start="normalized half"),
    Job(name="normalized torn", model="normalized", start="normalized half", torn=True),
    Job(name="deep", model="deep", patience=5, spread=TWO | {"mtbf_hours": 0.01}),
    Job(name="deep half", model="deep", patience=5, stop=STOP),
    Job(name="deep, then fsdp", model="deep", patience=5, start="deep half", spread=FSDP),
    Job(name="powersgd", model="deep", spread=POWERSGD),
    Job(name="powersgd half", model="deep", spread=POWERSGD, stop=STOP),
    Job(name="powersgd rest", model="deep", spread=POWERSGD, start="powersgd half"),
    Job(name="apart", model="normalized", spread=APART),
    Job(name="apart half", model="normalized", spread=APART, stop=STOP),
    Job(name="apart rest", model="normalized", spread=APART, start="apart half"),
]


def run(size, folder, asked):
    """Does the jobs in so many processes."""
    write_json(folder / "jobs.json", [asdict(job) for job in asked])
    environment = {
        **os.environ,
        "PYTHONPATH": import_path(),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    agent = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    command = [sys.executable, *agent, "--rdzv-endpoint=localhost:0", str(JOBS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder, job):
    model = jobs.MODELS[read_json(folder / job / "job.json")["model"]]()
    read_weights(folder / job / "weights", model)
    return model.state_dict()


def difference(folder, one, other):
    first, second = weights(folder, one), weights(folder, other)
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder in which two processes did the jobs of a pair."""
    folder = tmp_path_factory.mktemp("pair")
    run(2, folder, PAIR)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["normalized", "powersgd", "apart"])
def test_goes_on_to_the_same_end_bit_for_bit(pair, whole):
    rest = f"{whole} rest"
    assert difference(pair, whole, rest) == 0
    assert read_json(pair / whole / "curves.json") == read_json(pair / rest / "curves.json")


@pytest.mark.slow
def test_is_written_when_processes_that_go_steps_of_their_own_have_the_same_weights(pair):
    written = [path.name for path in (pair / "apart half" / "resume").iterdir()]
    assert written
    assert set(written) <= {"step=8.ckpt", "step=12.ckpt"}


@pytest.mark.slow
def test_goes_back_to_the_checkpoint_before_where_a_share_is_altered(pair):
    kept = [path.name for path in (pair / "normalized half" / "resume").iterdir()]
    left = [path.name for path in (pair / "normalized torn" / "resume").iterdir()]
    assert len(kept) == 2
    assert len(left) == 1
    assert set(left) < set(kept)
    assert difference(pair, "normalized", "normalized torn") == 0


@pytest.mark.slow
def test_tells_the_interval_that_it_chose(pair):
    *_, told = read_json(pair / "deep" / "notes.json")
    assert re.fullmatch(r"A checkpoint every .* s, chosen for one failure in 0\.01 h .* work of .* s\.", told)
    assert len(read_json(pair / "normalized" / "notes.json")) == len(read_json(pair / "deep" / "notes.json")) - 1


@pytest.mark.slow
def test_goes_on_as_another_strategy(pair):
    assert difference(pair, "deep", "deep, then fsdp") <= 1e-5
    alike = [read_json(pair / name / "curves.json") for name in ("deep", "deep, then fsdp")]
    assert alike[0].keys() == alike[1].keys()
    for curve, values in alike[0].items():
        assert alike[1][curve] == pytest.approx(values, abs=1e-5)


@pytest.mark.slow
def test_goes_on_in_one_process_of_two(pair, monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name == "LOCAL_WORLD_SIZE" else "0")
    with joined(Distributed(**TWO)) as group:
        jobs.do(Job(name="deep, then alone", model="deep", patience=5, start="deep half"), pair, group)
    assert difference(pair, "deep", "deep, then alone") <= 1e-5


@pytest.mark.slow
def test_refuses_weights_that_are_altered_or_of_another_model(pair):
    with pytest.raises(HastenError, match=r"is not of this model, which has no layers\.9\.bias"):
        read_weights(pair / "deep" / "weights", jobs.MLP(input_shape=(1, 8, 8), num_outputs=10, hidden=(32, 16, 32)))
    shard = next((pair / "deep" / "weights").glob("*.safetensors"))
    before = shard.read_bytes()
    jobs.alter(shard)
    with pytest.raises(HastenError, match=r"is torn: the SHA-256 of shard-.*safetensors does not match"):
        weights(pair, "deep")
    shard.write_bytes(before)


ARRANGEMENTS = {
    2: {
        "replicas": TWO,
        "tensor": {"kind": "tensor", "devices": 2, "tensor": 2},
        "pipeline": {"kind": "pipeline", "devices": 2, "pipeline": 2},
        "shards": FSDP,
    },
    4: {
        "shards and tensor": {"kind": "hybrid", "devices": 4, "shards": 2, "tensor": 2},
        "pipeline and shards": {"kind": "hybrid", "devices": 4, "pipeline": 2, "shards": 2},
        "replicas again": {"kind": "ddp", "devices": 4},
    },
}


@pytest.mark.drill
def test_goes_on_from_arrangement_to_arrangement(tmp_path):
    alike = {"model": "deep", "epochs": 18, "parts": 2}
    before, step = None, 0
    for size, arrangements in ARRANGEMENTS.items():
        asked = [Job(name="deep", **alike)] if before is None else []
        for name, spread in arrangements.items():
            step += 10
            stop = None if name == "replicas again" else step
            asked.append(Job(name=f"deep, {name}", spread=spread, start=before, stop=stop, **alike))
            before = asked[-1].name
        run(size, tmp_path, asked)
    largest = difference(tmp_path, "deep", before)
    print(f"{step // 10 - 1} times in another arrangement: largest difference {largest:.2g}")
    assert largest <= 1e-5
