"""Processes that make shards: `python -m hasten.data.preparers` is one, driven by `Preparers`.

They are started anew rather than forked, since a fork of a process with threads (PyTorch's, Lightning's) may hang, and
not by `multiprocessing`, which runs the caller's script again and may not be used below one of its own workers. What
they import is NumPy, and what the transforms need: they start in a fifth of a second.

Pickles go both ways: first the job, answered by whether it can be done here; then shards, each answered by its checksum
or by the error that it raised.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO

from hasten.core.errors import ConfigError, HastenError, first_line
from hasten.core.interpreter import import_path, private_channel
from hasten.data.job import Job
from hasten.data.pieces import Shard

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Preparers:
    """As many processes as are asked for, for the length of a `with` block.

    Each is a session of its own, so that Ctrl-C reaches only this one, which ends them; and each ends with this one,
    however that ends, once it is through with its shard.
    """

    def __init__(self, job: Job, processes: int) -> None:
        self._job = job
        self._number = processes
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Preparers:
        self._printed = tempfile.TemporaryFile()
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": import_path()}
        for _ in range(self._number):
            process = subprocess.Popen(
                # -P: its import path is the parent's, with nothing put before it.
                [sys.executable, "-P", "-m", "hasten.data.preparers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                env=environment,
                start_new_session=True,
            )
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    pipe.close()
        self._printed.close()

    def make(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, str]]:
        """Shards with their checksums, as they are finished. Takes none where a process can't import the transforms.

        Raises:
            ConfigError: a transform refuses the rows of a shard; of several the first.
            HastenError: a process died, or a transform raised what it should not.
        """
        if not self._ready():
            return
        idle = list(self._processes)
        busy: dict[int, tuple[subprocess.Popen[bytes], Shard]] = {}
        problems: dict[int, HastenError] = {}
        # The next shard is read while the processes work.
        following = next(shards, None)
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ)
            while busy or (following is not None and not problems):
                while idle and following is not None and not problems:
                    process = idle.pop()
                    self._send(process, following)
                    busy[process.pid] = process, following
                    following = next(shards, None)
                ready = {key.fd for key, _ in selector.select()}
                for process, shard in [each for each in busy.values() if _descriptor(each[0]) in ready]:
                    del busy[process.pid]
                    idle.append(process)
                    digest, problem = self._answer(process)
                    if problem is None:
                        yield shard, digest
                    else:
                        problems[shard.number] = problem
        if problems:
            raise problems[min(problems)]

    def _ready(self) -> bool:
        """Whether all can do the job."""
        try:
            job = pickle.dumps(self._job)
        except (pickle.PicklingError, AttributeError, TypeError):
            return False
        for process in self._processes:
            assert process.stdin is not None
            self._send(process, job)
        answers = [self._receive(process) for process in self._processes]
        return all(answers)

    def _answer(self, process: subprocess.Popen[bytes]) -> tuple[str, HastenError | None]:
        kind, told = self._receive(process)
        if kind == "refused":
            return "", ConfigError(*told)
        if kind == "raised":
            return "", HastenError(f"data: {told}")
        return told, None

    def _send(self, process: subprocess.Popen[bytes], what: Any) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(what, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        try:
            return pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._death(process) from None

    def _death(self, process: subprocess.Popen[bytes]) -> HastenError:
        code = process.wait()
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            cause = f"{cause}, most likely because memory ran out"
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        return HastenError(
            f"data: a process that prepares rows died of {cause}{f' ({lines[-1]})' if lines else ''}; what is finished "
            "is kept, and the same command goes on from it"
        )


def _descriptor(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return process.stdout.fileno()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    job: Job | None = None
    packed: bytes = pickle.load(requests)
    with suppress(Exception):  # whatever importing somebody's module may raise
        job = pickle.loads(packed)
    _give(answers, job is not None)
    while job is not None:
        try:
            shard = pickle.load(requests)
        except EOFError:  # the parent has ended
            return
        _give(answers, _made(job, shard))


def _made(job: Job, shard: Shard) -> tuple[str, Any]:
    try:
        return "made", job.make(shard)
    except ConfigError as error:
        return "refused", error.problems
    except Exception as error:
        return "raised", f"{type(error).__name__}: {first_line(error)}"


def _give(answers: BinaryIO, what: Any) -> None:
    pickle.dump(what, answers)
    answers.flush()


if __name__ == "__main__":
    # The parent ends it; on a terminal Ctrl-C is the parent's too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given, told = private_channel()
    with open(given.fileno(), "rb", closefd=False) as requests, open(told.fileno(), "wb", closefd=False) as answers:
        _serve(requests, answers)
