"""Serves one engine in a process of its own: `python -m hasten.evidence.worker`, driven by `evidence.process.Worker`.

One JSON object a line on standard input asks, one on standard output answers. A request names what to do and its
arguments; the answer is `{"result": ...}` or `{"error": type and message, "trace": traceback}`, after which the process
goes on. It ends when its standard input does, hence with its parent.

A compiled folder holds `engine.json`, the config node of the engine, beside what `Engine.compile` wrote.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice, pairwise, repeat
from math import ceil
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.construct import construct
from hasten.core.cuda import process_bytes
from hasten.core.errors import EngineError, HastenError
from hasten.core.files import write_json
from hasten.core.interfaces import Engine, Graph, Runner, Signature, Stream
from hasten.core.interpreter import private_channel

ENGINE_FILE = "engine.json"


def read_engine(folder: Path) -> Engine:
    """The engine that a compiled folder declares.

    Raises:
        EngineError: the folder declares none.
        ConfigError: its class does not import or does not take these settings.
    """
    file = folder / ENGINE_FILE
    try:
        node = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{file} does not say which engine runs this folder: {error}") from error
    return _engine(node)


class Server:
    """What a worker can be asked to do: every public method, with JSON arguments and a JSON result."""

    def __init__(self) -> None:
        self._folder = Path()
        self._runner: Runner | None = None

    def load(self, folder: str) -> None:
        self._folder = Path(folder)
        self._runner = read_engine(self._folder).load(self._folder)

    def warm_up(self, inputs: str, calls: int, seconds: float) -> int:
        """Calls until both are reached.

        Returns:
            Median nanoseconds of the later half of the calls.
        """
        runner, request, durations = self._loaded(), read_inputs(Path(inputs)), list[int]()
        start = perf_counter_ns()
        while len(durations) < calls or perf_counter_ns() - start < seconds * 1e9:
            durations += _durations(runner, request, 1)
        return int(np.median(durations[len(durations) // 2 :]))

    def time(self, inputs: str, settle: int, calls: int, stream: bool) -> dict[str, Any]:
        """Nanoseconds of each call, after `settle` calls that refill the caches which other processes have emptied.

        Args:
            stream: of a runner that works on several requests at once, the nanoseconds from one output to the next
                while it always has enough of them.

        Returns:
            `durations`, and `starved`: nanoseconds in which threads of this process were ready and had no CPU. Of a
            stream, the most that one of the processes had that work for it; this one, which hands out their work, may
            be among those that they had to wait for.
        """
        runner, request = self._loaded(), read_inputs(Path(inputs))
        if stream and isinstance(runner, Stream):
            _, *helpers = _family(os.getpid())
            waited = {pid: _starved_ns(pid) for pid in helpers}
            durations = _intervals(runner, request, settle, calls)
            starved = max((_starved_ns(pid) - before for pid, before in waited.items()), default=0)
            return {"durations": durations, "starved": starved}
        for _ in range(settle):
            runner(*request)
        before = _starved_ns(os.getpid())
        durations = _durations(runner, request, calls)
        return {"durations": durations, "starved": _starved_ns(os.getpid()) - before}

    def request(self, inputs: str, batch_size: int) -> None:
        """One request with the first rows."""
        runner, rows = self._loaded(), read_inputs(Path(inputs))
        runner(*(values[:batch_size] for values in rows))

    def predict(self, inputs: str, outputs: str, batch_size: int) -> None:
        runner, rows = self._loaded(), read_inputs(Path(inputs))
        parts = []
        for start in range(0, len(rows[0]), batch_size):
            batch = [values[start : start + batch_size] for values in rows]
            part = np.asarray(runner(*batch))
            if len(part) != len(batch[0]):
                raise EngineError(f"{self._folder} gave {len(part)} rows of outputs for {len(batch[0])} rows of inputs")
            parts.append(part.copy())
        np.save(outputs, np.concatenate(parts))

    def memory(self) -> int:
        """Peak resident set in bytes, of this process and of those that work for it by now, and its memory on a GPU.

        Pages that several of them share are counted for each.
        """
        return sum(map(_peak_bytes, _family(os.getpid()))) + _gpu_bytes()

    def trace(self, inputs: str, requests: int) -> list[list[Any]]:
        """When which device worked on what, for so many requests in a stream; of a `Stream` that keeps a `trace`."""
        runner, request = self._loaded(), read_inputs(Path(inputs))
        if not (isinstance(runner, Stream) and hasattr(runner, "trace")):
            raise EngineError(f"{self._folder} has one device, and keeps no trace of it")
        runner.trace.clear()
        deque(runner.stream(repeat(request, requests)), maxlen=0)
        return [list(entry) for entry in runner.trace]

    def operators(self, folder: str, inputs: str, repeats: int) -> list[dict[str, Any]]:
        times = read_engine(Path(folder)).operators(Path(folder), read_inputs(Path(inputs)), repeats)
        return [asdict(operator) for operator in times]

    def integer_share(self, folder: str) -> float:
        return float(read_engine(Path(folder)).integer_share(Path(folder)))

    def notes(self, folder: str) -> list[str]:
        return list(read_engine(Path(folder)).notes(Path(folder)))

    def compile(self, engine: Mapping[str, Any], graph: Mapping[str, Any], folder: str) -> None:
        """Writes what the engine needs and, when all of it is there, `engine.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        _engine(engine).compile(
            Graph(
                module=Path(graph["module"]),
                onnx=Path(graph["onnx"]),
                signature=Signature.from_dict(graph["signature"]),
                quantized=graph["quantized"],
                reference=Path(graph["reference"]),
            ),
            Path(folder),
        )
        write_json(Path(folder) / ENGINE_FILE, dict(engine))

    def _loaded(self) -> Runner:
        if self._runner is None:
            raise EngineError("the worker was asked to run an engine before it loaded one")
        return self._runner


def write_inputs(file: Path, inputs: Iterable[NDArray[Any]]) -> Path:
    """Keeps one array an input, in the order of the signature, for a worker to read."""
    np.savez(file, *inputs)
    return file


def read_inputs(file: Path) -> list[NDArray[Any]]:
    """What `write_inputs` wrote."""
    with np.load(file, allow_pickle=False) as archive:
        return [archive[f"arr_{place}"] for place in range(len(archive.files))]


def _engine(node: Mapping[str, Any]) -> Engine:
    engine = construct(node, "engine")
    if not isinstance(engine, Engine):
        raise EngineError(f"engine._target_={node['_target_']} is not an Engine")
    return engine


def _gpu_bytes() -> int:
    """GPU memory of this process: context, weights and buffers, of which the engines give none back while they serve.

    As the driver tells it; where it can't tell processes apart (in most containers), the peak of what PyTorch reserved,
    which holds neither the context nor what another library took. 0 where no GPU is used.
    """
    torch = sys.modules.get("torch")  # every engine on a GPU has imported it
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return process_bytes(os.getpid()) or int(torch.cuda.max_memory_reserved())


def _starved_ns(pid: int) -> int:
    """How long the threads of a process have waited for a CPU so far; 0 where the kernel does not tell."""
    waited = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            waited += int(file.read_text().split()[1])
    return waited


def _durations(runner: Runner, request: Sequence[NDArray[Any]], calls: int) -> list[int]:
    stamps = [0] * (calls + 1)
    gc.disable()
    try:
        stamps[0] = perf_counter_ns()
        for call in range(calls):
            runner(*request)
            stamps[call + 1] = perf_counter_ns()
    finally:
        gc.enable()
    return [after - before for before, after in pairwise(stamps)]


def _intervals(runner: Stream, request: Sequence[NDArray[Any]], settle: int, calls: int) -> list[int]:
    """From one output to the next, while as many requests are under way as there may be.

    Outputs may come in bursts of as many: of those only whole ones are counted, and four at least.
    """
    burst = runner.in_flight
    before, counted = burst * ceil(max(1, settle) / burst), burst * max(4, ceil(calls / burst))
    outputs = runner.stream(repeat(request, before + counted + burst))
    stamps = []
    gc.disable()
    try:
        for _ in islice(outputs, before + counted):
            stamps.append(perf_counter_ns())
    finally:
        gc.enable()
    deque(outputs, maxlen=0)
    return [after - earlier for earlier, after in pairwise(stamps[before - 1 :])]


def _family(pid: int) -> list[int]:
    """A process and all that come from it and are alive."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has just ended
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == member]
    return found


def _peak_bytes(pid: int) -> int:
    """Of the resident set. Not getrusage's figure: that one starts at the parent's size, because it outlives exec."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise EngineError(f"/proc/{pid}/status has no line VmHWM, the peak resident set")


def _answer(server: Server, line: str) -> str:
    request = json.loads(line)
    handler: Callable[..., Any] = getattr(server, request.pop("do"))
    try:
        return json.dumps({"result": handler(**request)})
    except Exception as error:
        name = "" if isinstance(error, HastenError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or "no message"
        return json.dumps({"error": f"{name}{message}", "trace": traceback.format_exc()})


def main() -> None:
    requests, answers = private_channel()
    server = Server()
    for line in requests:
        answers.write(_answer(server, line) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
