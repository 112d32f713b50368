"""Starts the processes that train together with a first one, which somebody else starts and asks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import IO, Any

from hasten.core.interpreter import PARENT
from hasten.core.sections import Distributed
from hasten.evidence.pace import Companions
from hasten.evidence.process import command, expendable, last_lines, measured_environment, serving_environment
from hasten.stages import followers
from hasten.stages.followers import Planner


def arguments_of(spread: Distributed) -> tuple[str, ...]:
    """What each process is told of how the training is spread: nothing where one trains alone."""
    return () if spread.kind == "single" else (json.dumps(asdict(spread)),)


def companions(module: str, spread: Distributed, threads: int) -> AbstractContextManager[Companions]:
    """All processes of a training but the first, for the length of a `with` block.

    Each runs the module as the first does, with the same arguments and `RANK` of its own, on this machine or, where
    torchrun started this process on several hosts, on those of its followers. It calls
    `core.interpreter.leave_with_parent`, and ends with whoever started it.

    Args:
        threads: that each calculates with.
    """
    if planner := followers.planner():
        return _following(planner, module, spread, threads)
    return _beside(module, spread, threads)


def whereabouts(spread: Distributed) -> dict[str, Any]:
    """What a measurement depends on besides this machine: nothing where all processes are on it."""
    planner = followers.planner()
    if planner is None or spread.kind == "single":
        return {}
    return {"processes": planner.place.world, "of_a_host": planner.place.local_world}


@contextmanager
def _beside(module: str, spread: Distributed, threads: int) -> Iterator[Companions]:
    """On this machine."""
    common = meeting(spread.devices)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(companion(module, arguments_of(spread), {**common, **place(rank)}, threads))
            for rank in range(1, spread.devices)
        ]
        yield Companions(
            environment={**common, **place(0)},
            pids=[process.pid for process, _ in processes],
            told=lambda: _fate(processes),
        )


@contextmanager
def _following(planner: Planner, module: str, spread: Distributed, threads: int) -> Iterator[Companions]:
    """Started by followers; of their memory nothing is known."""
    environment = serving_environment(threads)
    with planner.job(module, arguments_of(spread), threads=threads, environment=environment) as job:

        def told() -> str:
            if (dead := job.died()) is None:
                return ""
            rank, end = dead
            return _death(rank, planner.place.world, end.code, end.told)

        yield Companions(environment=job.environment, pids=(), told=told)


@contextmanager
def companion(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], threads: int
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """One of them, and what it writes to its standard error."""
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            command(module, arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=written,
            env={**measured_environment(threads), **environment, PARENT: str(os.getpid())},
            start_new_session=True,
        )
        expendable(process.pid)
        try:
            yield process, written
        finally:
            followers.ended(process)


def meeting(size: int) -> dict[str, str]:
    """Variables by which so many processes of this machine meet, as torchrun sets them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "hasten",
    }


def place(rank: int) -> dict[str, str]:
    """Variables of one of the processes of this machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _fate(processes: Sequence[tuple[subprocess.Popen[bytes], IO[bytes]]]) -> str:
    """What became of those that have died, and what they said of it."""
    codes = [(rank, process.poll(), written) for rank, (process, written) in enumerate(processes, 1)]
    return "; ".join(
        _death(rank, len(processes) + 1, code, last_lines(written)) for rank, code, written in codes if code is not None
    )


def _death(rank: int, size: int, code: int, said: str) -> str:
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"process {rank} of {size} died of {cause}{f': {said}' if said else ''}"
