"""The parent's side of a training in several processes: starts them, watches them, reads what came of it.

They are started by torchrun, whose agent starts them again, from the last checkpoint, when one of them has died.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hasten.core.errors import PassError, first_line
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Progress
from hasten.core.interpreter import import_path
from hasten.core.sections import Distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

RANK = "hasten.stages.rank"
JOB, MODEL, PROGRESS, REFUSAL, RESULT, WEIGHTS = (
    "job.json",
    "model",
    "progress",
    "refusal.json",
    "result.json",
    "weights",
)
_LOOK_SECONDS = 0.2
_TAIL_LINES = 3


class NotHandedOverError(PassError):
    """A model can't be given to other processes."""


def train(
    model: nn.Module, job: Mapping[str, Any], spread: Distributed, *, threads: int, what: str, progress: Progress
) -> dict[str, Any]:
    """Trains a model in processes of their own and loads the weights into it.

    Args:
        model: changed in place.
        job: JSON-able; what `stages.rank` wants to know besides the model.
        threads: of each process.
        what: is trained, for progress and errors.

    Returns:
        `curves`, `cache` and `notes`, as of `training.fit.Fitted`.

    Raises:
        NotHandedOverError: the model can't be pickled.
        PassError: the training refused, or its processes died too often.
    """
    import torch

    from hasten.distributed.checkpoint import read_weights

    content = io.BytesIO()
    try:
        torch.save(model, content)
    except Exception as error:  # whatever pickling a user's module raises
        reason = first_line(error)
        raise NotHandedOverError(f"distributed={spread.kind} can't hand {what} to its processes: {reason}") from error
    # Only this user may read or write in it, and the processes look at the digest.
    with tempfile.TemporaryDirectory(prefix="hasten-group-") as scratch:
        folder = Path(scratch)
        (folder / MODEL).write_bytes(content.getbuffer())
        write_json(folder / JOB, {**job, "parent": os.getpid()})
        with _agent(folder, hashlib.sha256(content.getbuffer()).hexdigest(), spread, threads) as (agent, log):
            _follow(agent, folder, what, progress)
            if (folder / REFUSAL).exists():
                raise PassError(read_json(folder / REFUSAL)["reason"])
            if agent.returncode != 0 or not (folder / RESULT).exists():
                raise PassError(_death(agent.returncode, folder, log, spread, what))
        read_weights(folder / WEIGHTS, model)
        result: dict[str, Any] = read_json(folder / RESULT)
        return result


@contextmanager
def _agent(
    folder: Path, digest: str, spread: Distributed, threads: int
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """torchrun, and what it and its processes print; it ends with the block, and they with it."""
    command = [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("--nnodes=1", f"--nproc-per-node={spread.devices}", f"--max-restarts={spread.max_restarts}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.5"),
        *("-m", RANK, str(folder), digest),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": import_path(),
        "OMP_NUM_THREADS": str(threads),
        # Else processes that are started again read the addresses of dead ones and wait for them (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with tempfile.TemporaryFile() as log:
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield agent, log
        finally:
            _end(agent)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """Lets the agent end its processes, which are sessions of their own, before it is killed itself."""
    if agent.poll() is not None:
        return
    agent.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        agent.wait(timeout=45)
    if agent.poll() is None:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


def _follow(agent: subprocess.Popen[bytes], folder: Path, what: str, progress: Progress) -> None:
    """Tells the progress of the steps until the training has ended or refused."""
    shown, begun, ended = 0, False, False
    try:
        while not ended:
            ended = agent.poll() is not None or (folder / REFUSAL).exists()
            if (folder / PROGRESS).exists():
                done, total = map(int, (folder / PROGRESS).read_text().split())
                if not begun:
                    progress.start(what, total)
                    begun = True
                if done > shown:  # after a restart it goes on from a checkpoint, behind what was shown
                    progress.advance(done - shown)
                    shown = done
            if not ended:
                time.sleep(_LOOK_SECONDS)
    finally:
        if begun:
            progress.stop()


def _death(code: int | None, folder: Path, log: IO[bytes], spread: Distributed, what: str) -> str:
    errors = [file.read_text().strip().splitlines()[-1] for file in sorted(folder.glob("error-*.txt"))]
    log.seek(0)
    tail = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()][-_TAIL_LINES:]
    told = " | ".join(errors or tail)
    times = f"distributed.max_restarts={spread.max_restarts}"
    return f"the processes that trained {what} died more often than {times} allows (exit code {code}): {told}"
