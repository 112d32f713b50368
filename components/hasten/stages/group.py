"""The parent's side of a training in several processes: starts them, watches them, reads what came of it.

On one machine they are started by torchrun, whose agent starts them again, from the last checkpoint, when one of them
has died. Where torchrun started this process too, its followers are the group: `stages.followers`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from hasten.core.errors import PassError, first_line
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Progress
from hasten.core.interpreter import PARENT, import_path
from hasten.core.sections import Distributed
from hasten.stages import followers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

log = logging.getLogger(__name__)

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
    planner = followers.planner()
    # Only this user may read or write in it, and the processes look at the digest. Other hosts see only the store, in
    # which it lies with the stage in the making and is removed with it.
    with tempfile.TemporaryDirectory(prefix="hasten-group-", dir=job["folder"] if planner else None) as scratch:
        folder = Path(scratch)
        (folder / MODEL).write_bytes(content.getbuffer())
        write_json(folder / JOB, job)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        processes = _attempts(planner, folder, digest, spread, threads, what) if planner else None
        with processes or _agent(folder, digest, spread, threads) as (agent, output):
            _follow(agent, folder, what, progress)
            if (folder / REFUSAL).exists():
                raise PassError(read_json(folder / REFUSAL)["reason"])
            if agent.returncode != 0 or not (folder / RESULT).exists():
                raise PassError(_death(agent.returncode, folder, output, spread, what))
        read_weights(folder / WEIGHTS, model)
        result: dict[str, Any] = read_json(folder / RESULT)
        return result


class Processes(Protocol):
    """What torchrun's agent is to its processes."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None:
        """Their exit code; None while they train."""


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
        PARENT: str(os.getpid()),
        # Else processes that are started again read the addresses of dead ones and wait for them (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with tempfile.TemporaryFile() as output:
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            yield agent, output
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


@contextmanager
def _attempts(
    planner: followers.Planner, folder: Path, digest: str, spread: Distributed, threads: int, what: str
) -> Iterator[tuple[Attempts, IO[bytes]]]:
    """The processes of a group on several hosts, and what that of rank 0 prints; they end with the block."""
    with tempfile.TemporaryFile() as output, ExitStack() as running:

        def begin() -> tuple[followers.Job, subprocess.Popen[bytes]]:
            running.close()
            arguments = [str(folder), digest]
            job = running.enter_context(planner.job(RANK, arguments, threads=threads))
            first = followers.started(RANK, arguments, job.environment, output)
            running.callback(followers.ended, first)
            return job, first

        yield Attempts(begin, restarts=spread.max_restarts, refusal=folder / REFUSAL, what=what), output


class Attempts:
    """A group on several hosts, which is started again when one of it has died."""

    def __init__(
        self,
        begin: Callable[[], tuple[followers.Job, subprocess.Popen[bytes]]],
        *,
        restarts: int,
        refusal: Path,
        what: str,
    ) -> None:
        self._begin, self._left, self._refusal, self._what = begin, restarts, refusal, what
        self._job, self._first = begin()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Their exit code; None while they train.

        Raises:
            followers.Lost: a follower is gone.
        """
        own, other = self._first.poll(), self._job.died()
        if self.returncode is not None or self._refusal.exists():
            return self.returncode
        if own == 0 and self._job.finished():
            self.returncode = 0
        elif own or other:
            rank, end = other or (0, followers.Ended(own or 0, ""))
            log.warning(
                "the process of rank %d that trained %s ended with %d: %s", rank, self._what, end.code, end.told
            )
            if not self._left:
                self.returncode = own or end.code
            else:
                self._left -= 1
                self._job, self._first = self._begin()
        return self.returncode


def _follow(agent: Processes, folder: Path, what: str, progress: Progress) -> None:
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


def _death(code: int | None, folder: Path, output: IO[bytes], spread: Distributed, what: str) -> str:
    errors = [file.read_text().strip().splitlines()[-1] for file in sorted(folder.glob("error-*.txt"))]
    output.seek(0)
    tail = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()][-_TAIL_LINES:]
    told = " | ".join(errors or tail)
    times = f"distributed.max_restarts={spread.max_restarts}"
    return f"the processes that trained {what} died more often than {times} allows (exit code {code}): {told}"
