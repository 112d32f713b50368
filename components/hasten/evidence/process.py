"""The parent's side of a worker: starts it, asks it, turns whatever becomes of it into a value or an `EngineError`."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, OperatorTime

_TAIL_LINES = 5
_TAIL_BYTES = 4_000


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


class Timing(NamedTuple):
    """A block of requests.

    Attributes:
        seconds: of each.
        starved_seconds: in which the worker was ready to run and another process had the CPU.
    """

    seconds: NDArray[np.float64]
    starved_seconds: float


class Worker:
    """A process that serves one engine, for the length of a `with` block.

    It is a session of its own, so that Ctrl-C reaches only the parent, and it ends with the parent, however that ends.
    Every method raises EngineError when the engine raised (the worker goes on), died or took too long (it is gone).

    Args:
        threads: that one request may use.
        cpus: that it is confined to; none for all that its parent may use.
        timeout: seconds that one question may take.
    """

    def __init__(self, *, threads: int, cpus: Collection[int] = (), timeout: float = 600.0) -> None:
        self.threads = threads
        self.cpus = cpus
        self.timeout = timeout

    def __enter__(self) -> Worker:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            # -P: its import path is the parent's, with nothing put before it.
            [sys.executable, "-P", "-m", "hasten.evidence.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**os.environ, **serving_environment(self.threads), "PYTHONPATH": _import_path()},
            start_new_session=True,
        )
        if self.cpus:
            # Before it has threads, and before an engine counts the CPUs: it finds a machine of the target's size.
            os.sched_setaffinity(self._process.pid, self.cpus)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        self._stderr.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, folder: Path) -> None:
        """Loads what a folder with an `engine.json` holds; `warm_up`, `time` and `predict` run it."""
        self._ask("load", folder=str(folder))

    def warm_up(self, inputs: Path, *, calls: int, seconds: float) -> float:
        """Calls until both are reached, and says how many seconds a call takes by now (median)."""
        return float(self._ask("warm_up", inputs=str(inputs), calls=calls, seconds=seconds)) * 1e-9

    def time(self, inputs: Path, *, settle: int, calls: int) -> Timing:
        """Times `calls` requests with all rows of the file, after `settle` requests that are not counted."""
        answer = self._ask("time", inputs=str(inputs), settle=settle, calls=calls)
        return Timing(seconds=np.array(answer["durations"]) * 1e-9, starved_seconds=answer["starved"] * 1e-9)

    def predict(self, inputs: Path, outputs: Path, *, batch_size: int) -> None:
        """Writes the outputs of all rows that `worker.write_inputs` wrote into a file, as a .npy file."""
        self._ask("predict", inputs=str(inputs), outputs=str(outputs), batch_size=batch_size)

    def memory(self) -> int:
        """Peak resident set of the worker so far and the GPU memory that it holds, in bytes."""
        return int(self._ask("memory"))

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
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        except (BrokenPipeError, ValueError):  # it died in silence, or was found dead before and its pipes closed
            raise self._death(what, arguments) from None
        answer = json.loads(self._read_line(what, arguments))
        if "error" in answer:
            error = EngineError(answer["error"])
            error.add_note(answer["trace"])
            raise error
        return answer["result"]

    def _read_line(self, what: str, arguments: Mapping[str, Any]) -> bytes:
        assert self._process.stdout is not None
        descriptor, line, deadline = self._process.stdout.fileno(), bytearray(), monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - monotonic())):
                    self._kill()
                    raise EngineError(f"{_doing(what, arguments)} took longer than {self.timeout:g} s{self._tail()}")
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    raise self._death(what, arguments)
                line += chunk
        return bytes(line)

    def _death(self, what: str, arguments: Mapping[str, Any]) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._kill()
        code = self._process.returncode
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(f"the process died of {cause} during {_doing(what, arguments)}{self._tail()}")

    def _tail(self) -> str:
        """The last lines that the worker, or a library in it, wrote."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL_BYTES))
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {' | '.join(lines[-_TAIL_LINES:])}" if lines else ""

    def _kill(self) -> None:
        """Ends the worker and whatever it started (a compiler); nothing in it is worth an orderly end."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _doing(what: str, arguments: Mapping[str, Any]) -> str:
    return f"{what} of {arguments['folder']}" if "folder" in arguments else what


def _import_path() -> str:
    """Where this process imports from, less what is no place but the hook of an editable install."""
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path if os.path.exists(entry or os.curdir))
