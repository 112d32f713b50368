"""A training on two hosts goes on when one of them is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from hasten.core.files import read_json, write_json
from hasten.core.interpreter import import_path
from hasten.distributed.checkpoint import read_weights

JOBS = Path(__file__).with_name("jobs.py")
sys.path.insert(0, str(JOBS.parent))
import jobs  # noqa: E402
from jobs import Job  # noqa: E402

sys.path.remove(str(JOBS.parent))

QUICK = "last_call_timeout=5,join_timeout=120,keep_alive_interval=2,keep_alive_max_attempt=3"


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def host(folder, port, number):
    """torchrun as it is started on each of at most two hosts, of which the first is where they meet."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=training", "--monitor-interval=0.5"),
        *(f"--rdzv-conf={QUICK},is_host={number == 0}", "--local-addr=localhost", str(JOBS), str(folder)),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": import_path(),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / f"host{number}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers(agent):
    """Processes that an agent has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def end(agent):
    if agent.poll() is None:
        for process in (*workers(agent), agent.pid):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def train(folder, job, *, lose):
    """Trains on two hosts, and loses the second in mid-training, with all that runs on it.

    Returns:
        Lines that the first host printed.
    """
    folder.mkdir()
    write_json(folder / "jobs.json", [asdict(job)])
    port = free_port()
    with ExitStack() as stack:
        agents = []
        for number in range(2):
            agents.append(host(folder, port, number))
            stack.callback(end, agents[-1])
        if lose:
            wait(lambda: [*(folder / job.name / "resume").glob("step=*.ckpt")], 180)
            end(agents[1])
        wait(lambda: agents[0].poll() is not None, 240)
        log = (folder / "host0.log").read_text()
        assert lose or agents[0].returncode == 0, log[-3000:]
    return log


@pytest.mark.drill
def test_goes_on_with_the_process_that_is_left(tmp_path):
    job = Job(name="deep", model="deep", pause=0.5, spread={"kind": "ddp", "devices": 2, "timeout_seconds": 30})
    ends = {}
    for name, lose in (("undisturbed", False), ("smaller", True)):
        log = train(tmp_path / name, job, lose=lose)
        model = jobs.deep()
        assert (tmp_path / name / "deep" / "weights").exists(), log[-3000:]
        read_weights(tmp_path / name / "deep" / "weights", model)
        ends[name] = model.state_dict()
    largest = max((ends["smaller"][name] - ends["undisturbed"][name]).abs().max().item() for name in ends["smaller"])
    print(f"one of two hosts lost: largest difference {largest:.2g}")
    assert largest <= 1e-5
    curves = [read_json(tmp_path / name / "deep" / "curves.json") for name in ends]
    assert curves[1]["train_loss"] == pytest.approx(curves[0]["train_loss"], abs=1e-5)


@pytest.mark.drill
def test_says_so_where_the_model_cannot_be_divided_among_fewer(tmp_path):
    spread = {"kind": "tensor", "devices": 2, "tensor": 2, "timeout_seconds": 30}
    log = train(tmp_path / "lost", Job(name="deep", model="deep", pause=0.5, spread=spread), lose=True)
    assert "of distributed.devices=2 processes 1 are there" in log
    assert "distributed.devices=1 can't be divided by distributed.tensor=2" in log
