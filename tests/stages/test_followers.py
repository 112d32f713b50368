"""Who plans and who follows where torchrun has started the same command several times."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from hasten import cli
from hasten.core.errors import ConfigError
from hasten.core.interpreter import import_path
from hasten.core.sections import Distributed
from hasten.stages import followers
from hasten.stages.followers import Line, Lost, Place, Planner

FOLLOW = "import sys; from hasten.stages import followers as f; sys.exit(f.follow(f.place()))"
ENDS_AT_ONCE, IS_NOT_THERE = "hasten.stages.followers", "hasten.stages.nonesuch"
TWO = Distributed(kind="ddp", devices=2)


def variables(rank: int, world: int = 2, port: int = 0, **more: str) -> dict[str, str]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**own, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run", **more}


def placed(rank: int, world: int = 2, port: int = 0, **more: str) -> Place:
    return Place(rank=rank, world=world, local_world=1, variables=variables(rank, world, port, **more))


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def follower(port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, **variables(1, port=port), "PYTHONPATH": import_path()}
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOW], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(true: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_follower_runs_what_it_is_told_and_leaves_with_the_planners_exit_code(
    tmp_path: Path, port: int, follower: subprocess.Popen[str]
) -> None:
    with Planner(placed(0, port=port)) as planner:
        planner.meet(TWO, tmp_path, min_nodes=None)
        with planner.job(ENDS_AT_ONCE, [], threads=1) as job:
            assert job.environment["RANK"] == "0"
            assert job.environment["MASTER_PORT"] != str(port)
            until(job.finished)
            assert job.died() is None
        with planner.job(IS_NOT_THERE, [], threads=1) as job:
            until(job.died)
            rank, end = job.died() or (0, None)
            assert (rank, end and end.code) == (1, 1)
            assert end
            assert "nonesuch" in end.told
            assert not job.finished()
        planner.dismiss(7)
        assert follower.wait(timeout=20) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_a_follower_has_started_ends_with_the_job_and_with_the_follower(
    tmp_path: Path, port: int, follower: subprocess.Popen[str]
) -> None:
    os.mkfifo(tmp_path / "job.json")  # whoever reads it waits

    def waiting() -> list[str]:
        commands = {entry.name: entry / "cmdline" for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        return [name for name, file in commands.items() if file.exists() and str(tmp_path).encode() in read(file)]

    with Planner(placed(0, port=port)) as planner:
        with planner.job("hasten.stages.rank", [str(tmp_path), ""], threads=1):
            until(waiting)
        until(lambda: not waiting())
        with planner.job("hasten.stages.rank", [str(tmp_path), ""], threads=1):
            until(waiting)
            follower.send_signal(signal.SIGTERM)
            assert follower.wait(timeout=20) == 130
            assert not waiting()


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_a_follower_ends_with_a_planner_that_dies(port: int, follower: subprocess.Popen[str]) -> None:
    with Planner(placed(0, port=port)) as planner:
        until(planner._is_complete)
    assert follower.wait(timeout=20) == 1
    assert follower.stderr
    assert "the process that plans is lost" in follower.stderr.read()


def test_a_planner_ends_with_a_follower_that_dies(port: int, follower: subprocess.Popen[str]) -> None:
    with Planner(placed(0, port=port)) as planner, planner.job(ENDS_AT_ONCE, [], threads=1) as job:
        follower.kill()
        with pytest.raises(Lost, match="the process of rank 1 is lost"):
            until(lambda: job.died() and False, 20)


def test_whoever_is_silent_is_lost(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(followers, "BEAT_SECONDS", 0.1)
    with Planner(placed(0, port=port)) as planner, closing(Line(socket.create_connection(("localhost", port)))) as mute:
        mute.send(rank=1)
        with (
            pytest.raises(Lost, match=r"nothing was heard from it for 0\.5 s"),
            planner.job(ENDS_AT_ONCE, [], threads=1) as job,
        ):
            until(lambda: job.died() and False, 20)
    with socket.create_server(("", port)):
        assert followers.follow(placed(1, port=port)) == 1


def test_a_store_that_is_not_shared_is_refused(tmp_path: Path, port: int) -> None:
    def blind() -> None:
        with closing(Line(socket.create_connection(("localhost", port)))) as line:
            line.send(rank=1)
            while "look" not in [message["do"] for message in line.received()]:
                pass
            line.send(seen=False, **{"from": 1})
            with suppress(OSError):
                line.received()

    with Planner(placed(0, port=port)) as planner:
        other = threading.Thread(target=blind, daemon=True)
        other.start()
        with pytest.raises(ConfigError, match=rf"store\.folder={tmp_path} is not shared: the process of rank 1 does"):
            planner.meet(TWO, tmp_path, min_nodes=None)


def test_nobody_waits_for_ever_for_a_follower_that_does_not_come(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followers, "START_SECONDS", 0.3)
    with Planner(placed(0, 3, port)) as planner:
        with pytest.raises(Lost, match=r"no process of rank 1, 2 came within 0\.3 s"):
            planner.meet(Distributed(kind="ddp", devices=3), tmp_path, min_nodes=None)
        planner.dismiss(1, patience=0.0)
    assert followers.follow(placed(1, port=port)) == 1


@pytest.mark.parametrize(
    ("world", "min_nodes", "problem"),
    [
        (3, None, "torchrun started 3 processes, and distributed.devices=4: "),
        (8, None, "torchrun started 8 processes, and distributed.devices=4: "),
        (1, 2, "at least launch.min_nodes times --nproc-per-node"),
        (3, 1, "distributed.devices=3 can't be divided by distributed.tensor=2"),
    ],
)
def test_as_many_processes_as_devices_or_as_few_as_allowed(
    tmp_path: Path, port: int, world: int, min_nodes: int | None, problem: str
) -> None:
    spread = Distributed(kind="hybrid", devices=4, tensor=2)
    with Planner(placed(0, world, port)) as planner:
        with pytest.raises(ConfigError) as told:
            planner.meet(spread, tmp_path, min_nodes=min_nodes)
        planner.dismiss(2, patience=0.0)
    assert problem in str(told.value)


def test_goes_on_alone_where_that_is_allowed(tmp_path: Path, port: int) -> None:
    with Planner(placed(0, 1, port)) as planner:
        planner.meet(TWO, tmp_path, min_nodes=1)
        with planner.job(ENDS_AT_ONCE, [], threads=1) as job:
            assert job.environment["WORLD_SIZE"] == "1"
            assert job.finished()


def test_a_run_that_has_failed_by_itself_is_not_tried_again(tmp_path: Path, port: int) -> None:
    first, again = (placed(0, 1, port, TORCHELASTIC_RESTART_COUNT=count) for count in "01")

    def run(own: Place, code: int) -> int:
        def command() -> int:
            planner = followers.planner()
            assert planner
            planner.meet(Distributed(), tmp_path, min_nodes=None)
            return code

        return followers.planned(own, command)

    assert run(first, 1) == 1
    with pytest.raises(SystemExit) as ended:
        run(again, 0)
    assert ended.value.code == 1
    assert run(first, 0) == 0
    assert run(again, 0) == 0


def test_the_planner_takes_itself_for_no_part_of_a_group(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(0, 1, port).items():
        monkeypatch.setenv(name, value)
    own = followers.place()
    assert own
    assert followers.planned(own, lambda: sum(name in os.environ for name in variables(0))) == 0
    assert own.environment(port=1, threads=3, more={})["OMP_NUM_THREADS"] == "3"
    assert followers.place() is None


def test_a_store_that_torchrun_shares_is_refused_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        for name, value in variables(rank, TORCHELASTIC_USE_AGENT_STORE="True").items():
            monkeypatch.setenv(name, value)
        assert cli.run(["run"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in told


def test_a_sweep_in_processes_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables(0).items():
        monkeypatch.setenv(name, value)
    assert cli.run(["-m", "run", "hydra/launcher=joblib", "seed=0,1"]) == 2
    assert capsys.readouterr().err.startswith("hasten: hydra/launcher=joblib starts processes of its own")


def test_help_is_printed_by_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in variables(1).items():
        monkeypatch.setenv(name, value)
    assert cli.run(["--help"]) == 0
    assert capsys.readouterr().out == ""
