"""Runs the segments of one device in a process of its own: `python -m hasten.engines.device`, see `engines.placed`.

One JSON object a line on standard input asks, one on standard output answers. The first says where the process runs and
which memory it shares. Each of the others is a task: a folder that the device's engine compiled, to be loaded, or to be
run on tensors in the shared memory. A task is answered with where its result lies, or with what the engine raised; the
process goes on. It ends when its standard input does, hence with its parent.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from time import monotonic_ns
from typing import Any

from hasten.core.construct import construct
from hasten.core.errors import EngineError, HastenError
from hasten.core.interfaces import Engine, Runner
from hasten.core.interpreter import private_channel
from hasten.engines.shared import SharedMemory

NOTHING = ""
"""Folder of the segment that gives back what it reads: what remains is what handing tensors over costs."""


class Device:
    """One engine and the segments that it has loaded.

    Args:
        engine: the engine's config node.
    """

    def __init__(self, engine: Mapping[str, Any], memory: SharedMemory) -> None:
        self._node = engine
        self._memory = memory
        self._runners: dict[str, Runner] = {NOTHING: lambda *inputs: inputs[0]}

    def run(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Where the result lies, and from when to when it was worked on, in nanoseconds of the monotonic clock."""
        start = monotonic_ns()
        runner = self._loaded(task["folder"])
        if task["writes"] is None:
            return {}
        outputs = runner(*(self._memory.read(header) for header in task["reads"]))
        header = self._memory.write(task["writes"], outputs)
        return {"header": header, "start": start, "end": monotonic_ns()}

    def _loaded(self, folder: str) -> Runner:
        if folder not in self._runners:
            engine = construct(self._node, "engine")
            if not isinstance(engine, Engine):
                raise EngineError(f"{self._node['_target_']} is no engine")
            self._runners[folder] = engine.load(Path(folder))
        return self._runners[folder]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    requests, answers = private_channel()
    start = json.loads(next(requests))
    os.sched_setaffinity(0, start["cpus"])  # before an engine counts the CPUs and starts threads
    device = Device(start["engine"], SharedMemory(start["memory"]))
    for line in requests:
        task = json.loads(line)
        try:
            answer = device.run(task)
        except Exception as error:
            name = "" if isinstance(error, HastenError) else f"{type(error).__name__}: "
            answer = {"error": f"{name}{' '.join(str(error).split()) or 'no message'}"}
        answers.write(json.dumps({"task": task["task"], **answer}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
