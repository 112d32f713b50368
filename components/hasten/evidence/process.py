"""The parent's side of a worker: starts it, asks it, turns whatever becomes of it into a value or an `EngineError`."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, OperatorTime, Target
from hasten.core.interpreter import import_path
from hasten.core.memory import free_bytes, resident_bytes

FREE_SHARE = 0.9
"""Share of what is free that a worker may take, where no limit is declared."""

_TAIL_LINES = 5
_TAIL_BYTES = 4_000
_FEW_REQUESTS = ("request", "warm_up", "time")
_TIMED = ("warm_up", "time")
_WATCH_SECONDS = 0.025
_WATCH_SECONDS_TIMED = 0.25
"""Between two looks at a worker's memory. A block of timed requests is shorter than that, and left alone."""


def serving_environment(threads: int) -> dict[str, str]:
    """Environment variables of every process that is measured, equal for both sides of a comparison.

    glibc's default malloc gives large buffers back to the system after each request, and the page faults of getting
    them anew make eager PyTorch up to four times slower at larger batches: without these thresholds the speed-up of
    whatever reuses its buffers would be a fraud. The bound on spinning puts idle threads to sleep while another process
    is measured; sleeping at once (OMP_WAIT_POLICY) would slow eager PyTorch on several threads, and flatter others.
    """
    return {
        "MALLOC_MMAP_THRESHOLD_": str(8 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "10000",
        "PYTHONHASHSEED": "0",
    }


def command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """That runs a module of the parent's import path, with nothing put before it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def measured_environment(threads: int) -> dict[str, str]:
    """The parent's environment variables with those of `serving_environment`."""
    return {**os.environ, **serving_environment(threads), "PYTHONPATH": import_path()}


def expendable(pid: int) -> None:
    """Where memory runs out before anybody looks, the kernel shall take this process and not its parent."""
    with suppress(OSError):  # it has died already, or there is no /proc
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def last_lines(written: IO[bytes]) -> str:
    """What a process, or a library in it, wrote last into its standard error."""
    size = written.seek(0, os.SEEK_END)
    written.seek(max(0, size - _TAIL_BYTES))
    lines = [line.strip() for line in written.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:])


class Timing(NamedTuple):
    """A block of requests.

    Attributes:
        seconds: of each.
        starved_seconds: in which the worker was ready to run and another process had the CPU.
    """

    seconds: NDArray[np.float64]
    starved_seconds: float


class Process:
    """A process that answers questions, for the length of a `with` block.

    It is a session of its own, so that Ctrl-C reaches only the parent, and it ends with the parent, however that ends.

    Args:
        module: that it runs; one JSON object a line on standard input asks, one on standard output answers.
        threads: that it may calculate with.
        cpus: that it is confined to; none for all that its parent may use.
        memory_limit_mb: resident set of the process and its children, 1 MB = 10^6 bytes; None for `FREE_SHARE` of what
            this machine, or its control group, has free when the process starts.
        arguments: of the module's command line.
        environment: variables that the parent does not have, or has otherwise.
    """

    def __init__(
        self,
        module: str,
        *,
        threads: int,
        cpus: Collection[int] = (),
        memory_limit_mb: float | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module
        self.arguments = arguments
        self.environment = environment or {}
        self.threads = threads
        self.cpus = cpus
        self.memory_limit_mb = memory_limit_mb

    def __enter__(self) -> Process:
        self._allowed, self._allowance = self._memory_allowance()
        self._ended_here = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command(self.module, self.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**measured_environment(self.threads), **self.environment},
            start_new_session=True,
        )
        if self.cpus:
            # Before it has threads, and before an engine counts the CPUs: it finds a machine of the target's size.
            os.sched_setaffinity(self._process.pid, self.cpus)
        expendable(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        self._stderr.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self, what: str, arguments: Mapping[str, Any], *, timeout: float, knob: str, pause: float = _WATCH_SECONDS
    ) -> Any:
        """The answer to one question.

        Args:
            timeout: seconds that it may take.
            knob: that sets them, for the error.
            pause: seconds between two looks at the process' memory.

        Raises:
            EngineError: it raised (the process goes on), died, took too long or took too much memory (it is gone).
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        except (BrokenPipeError, ValueError):  # it died in silence, or was found dead before and its pipes closed
            raise self._death(what, arguments) from None
        answer = json.loads(self._read_line(what, arguments, timeout, knob, pause))
        if "error" in answer:
            error = EngineError(answer["error"])
            error.add_note(answer["trace"])
            raise error
        return answer["result"]

    def _read_line(self, what: str, arguments: Mapping[str, Any], timeout: float, knob: str, pause: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, line = self._process.stdout.fileno(), bytearray()
        deadline = monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - monotonic()
                if selector.select(max(0.0, min(left, pause))):
                    chunk = os.read(descriptor, 1 << 16)
                    if not chunk:
                        raise self._death(what, arguments)
                    line += chunk
                elif self._process.poll() is not None and not selector.select(0):
                    raise self._death(what, arguments)  # a child of it holds the pipe open
                elif left <= 0:
                    self._kill()
                    told = f"{_doing(what, arguments)} took longer than {timeout:g} s ({knob})"
                    raise EngineError(f"{told}{self._tail()}")
                else:
                    self._watch(what, arguments)
        return bytes(line)

    def _memory_allowance(self) -> tuple[float, str]:
        """Bytes that it may take, and why not more."""
        if self.memory_limit_mb is not None:
            limit = self.memory_limit_mb
            return limit * 1e6, f"target.memory_limit_mb={limit:g} allows {_megabytes(limit * 1e6)}"
        free = free_bytes()
        if free is None:
            return inf, ""
        allowed = FREE_SHARE * free
        why = f"of {_megabytes(free)} that were free, {_megabytes(allowed)} are allowed (target.memory_limit_mb=null)"
        return allowed, why

    def _watch(self, what: str, arguments: Mapping[str, Any]) -> None:
        """Ends a worker that takes too much memory."""
        taken = resident_bytes(self._process.pid)
        if taken > self._allowed:
            self._kill()
            told = f"{_doing(what, arguments)} took {_megabytes(taken)} of memory, {self._allowance}"
            raise EngineError(f"{told}{self._tail()}")

    def _death(self, what: str, arguments: Mapping[str, Any]) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._kill()
        code = self._process.returncode
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL and not self._ended_here:
            cause = f"{cause}, most likely because memory ran out ({self._allowance}),"
        return EngineError(f"the process died of {cause} during {_doing(what, arguments)}{self._tail()}")

    def _tail(self) -> str:
        said = last_lines(self._stderr)
        return f": {said}" if said else ""

    def _kill(self) -> None:
        """Ends the worker and whatever it started (a compiler); nothing in it is worth an orderly end."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:  # it has been ended, and its id may be another's by now
            return
        self._ended_here = self._process.poll() is None
        with suppress(ProcessLookupError):  # a worker that has died may have left a child in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class Worker:
    """A process that serves one engine, for the length of a `with` block.

    Every method raises EngineError when the engine raised (the worker goes on), died, took too long or took too much
    memory (it is gone).

    Args:
        threads: that one request may use.
        cpus: as of `Process`.
        timeout: seconds that one question may take.
        request_timeout: seconds that the few requests of a question to time them may take.
        memory_limit_mb: as of `Process`.

    Attributes:
        process: that answers.
    """

    def __init__(
        self,
        *,
        threads: int,
        cpus: Collection[int] = (),
        timeout: float = 600.0,
        request_timeout: float = 120.0,
        memory_limit_mb: float | None = None,
    ) -> None:
        self.timeout = timeout
        self.request_timeout = request_timeout
        self.process = Process("hasten.evidence.worker", threads=threads, cpus=cpus, memory_limit_mb=memory_limit_mb)

    @classmethod
    def of(cls, target: Target, cpus: Collection[int] = ()) -> Worker:
        """With the threads and the limits of the target."""
        return cls(
            threads=target.threads,
            cpus=cpus,
            timeout=target.timeout_seconds,
            request_timeout=target.request_timeout_seconds,
            memory_limit_mb=target.memory_limit_mb,
        )

    def __enter__(self) -> Worker:
        self.process.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        return self.process.pid

    def load(self, folder: Path) -> None:
        """Loads what a folder with an `engine.json` holds; `warm_up`, `time` and `predict` run it."""
        self._ask("load", folder=str(folder))

    def warm_up(self, inputs: Path, *, calls: int, seconds: float) -> float:
        """Calls until both are reached, and says how many seconds a call takes by now (median)."""
        return float(self._ask("warm_up", inputs=str(inputs), calls=calls, seconds=seconds)) * 1e-9

    def time(self, inputs: Path, *, settle: int, calls: int, stream: bool = False) -> Timing:
        """Times `calls` requests with all rows of the file, after `settle` requests that are not counted.

        Args:
            stream: of a runner that works on several at once, time from one output to the next instead.
        """
        answer = self._ask("time", inputs=str(inputs), settle=settle, calls=calls, stream=stream)
        return Timing(seconds=np.array(answer["durations"]) * 1e-9, starved_seconds=answer["starved"] * 1e-9)

    def predict(self, inputs: Path, outputs: Path, *, batch_size: int) -> None:
        """Writes the outputs of all rows that `worker.write_inputs` wrote into a file, as a .npy file."""
        # How long all rows take is not known before: one that hangs is found out by its first request.
        self._ask("request", inputs=str(inputs), batch_size=batch_size)
        self._ask("predict", inputs=str(inputs), outputs=str(outputs), batch_size=batch_size)

    def memory(self) -> int:
        """Peak resident set of the worker so far and the GPU memory that it holds, in bytes; the sum over it and the
        processes that work for it."""
        return int(self._ask("memory"))

    def trace(self, inputs: Path, *, requests: int) -> list[list[Any]]:
        """Request, stage, device, start and end in nanoseconds of what the devices of a loaded stream did."""
        answer: list[list[Any]] = self._ask("trace", inputs=str(inputs), requests=requests)
        return answer

    def operators(self, folder: Path, inputs: Path, *, repeats: int) -> list[OperatorTime]:
        """`Engine.operators` of a compiled folder with all rows of the file as one request."""
        times = self._ask("operators", folder=str(folder), inputs=str(inputs), repeats=repeats)
        return [OperatorTime(**values) for values in times]

    def integer_share(self, folder: Path) -> float:
        """`Engine.integer_share` of a compiled folder."""
        return float(self._ask("integer_share", folder=str(folder)))

    def notes(self, folder: Path) -> tuple[str, ...]:
        """`Engine.notes` of a compiled folder."""
        return tuple(self._ask("notes", folder=str(folder)))

    def compile(self, engine: Mapping[str, Any], graph: Graph, folder: Path) -> None:
        """`Engine.compile` into the folder, which then holds the engine's config node as `engine.json` too."""
        paths = {"module": str(graph.module), "onnx": str(graph.onnx), "reference": str(graph.reference)}
        signature = graph.signature.to_dict()
        described = {**paths, "signature": signature, "quantized": graph.quantized}
        self._ask("compile", engine=dict(engine), graph=described, folder=str(folder))

    def _ask(self, what: str, **arguments: Any) -> Any:
        few = what in _FEW_REQUESTS
        return self.process.ask(
            what,
            arguments,
            timeout=self.request_timeout if few else self.timeout,
            knob="target.request_timeout_seconds" if few else "target.timeout_seconds",
            pause=_WATCH_SECONDS_TIMED if what in _TIMED else _WATCH_SECONDS,
        )


def _doing(what: str, arguments: Mapping[str, Any]) -> str:
    return f"{what} of {arguments['folder']}" if "folder" in arguments else what


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB"
