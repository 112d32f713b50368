"""Starts the processes that train together with a first one, which somebody else starts and asks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import IO

from hasten.core.sections import Distributed
from hasten.evidence.pace import Companions
from hasten.evidence.process import command, expendable, last_lines, measured_environment


def arguments_of(spread: Distributed) -> tuple[str, ...]:
    """What each process is told of how the training is spread: nothing where one trains alone."""
    return () if spread.kind == "single" else (json.dumps(asdict(spread)),)


@contextmanager
def companions(module: str, spread: Distributed, threads: int) -> Iterator[Companions]:
    """All processes of a training but the first, on this machine, for the length of a `with` block.

    Each runs the module as the first does, with the same arguments and `RANK` of its own. It ends with this process,
    however that ends: when its standard input does.

    Args:
        threads: that each calculates with.
    """
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
def companion(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], threads: int
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """One of them, and what it writes to its standard error."""
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            command(module, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=written,
            env={**measured_environment(threads), **environment},
            start_new_session=True,
        )
        expendable(process.pid)
        try:
            yield process, written
        finally:
            with suppress(ProcessLookupError):  # it has ended, and left no child in its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


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
    told = []
    for rank, (process, written) in enumerate(processes, 1):
        if (code := process.poll()) is None:
            continue
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = last_lines(written)
        told.append(f"process {rank} of {len(processes) + 1} died of {cause}{f': {said}' if said else ''}")
    return "; ".join(told)
