"""Engines of a few lines, as a user's own module would hold them, and the folders that declare them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Serve = Callable[..., Path]

FAKES = '''
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np

from hasten.core.interfaces import Engine, OperatorTime


@dataclass(frozen=True, kw_only=True)
class Doubling(Engine):
    """Gives twice its input, after a while if wanted."""

    family = "fake"
    libraries = ()
    microseconds: float = 0.0

    def supports(self, quantized, target):
        return None

    def compile(self, graph, folder):
        (folder / "compiled.txt").write_text(f"{graph.onnx.name} {graph.signature.names} {graph.quantized}")

    def load(self, folder):
        return self.run

    def run(self, inputs):
        end = time.perf_counter() + self.microseconds * 1e-6
        while time.perf_counter() < end:
            pass
        return 2 * inputs

    def integer_share(self, folder):
        return 0.25

    def operators(self, folder, inputs, repeats):
        milliseconds, calls = np.float64(repeats), float(sum(map(len, inputs)))
        return [OperatorTime(name="double", kind="elementwise", milliseconds=milliseconds, calls=calls)]


class Subtracting(Doubling):
    """Takes two inputs, in the order of the signature."""

    def run(self, first, second):
        return first.astype(np.float32) - second


class Segfaulting(Doubling):
    def run(self, inputs):
        print("about to read address 0", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGSEGV)

    def compile(self, graph, folder):
        self.run(None)


class Exiting(Doubling):
    def run(self, inputs):
        sys.exit(3)


class Raising(Doubling):
    def run(self, inputs):
        raise ValueError("no kernel for\\nthis operator")


class Talkative(Doubling):
    def load(self, folder):
        print("[library] loading")
        os.write(1, b"[library] straight to descriptor 1")
        return self.run

    def run(self, inputs):
        print("[library] running", flush=True)
        assert sys.stdin.read() == ""
        return super().run(inputs)


class Hanging(Doubling):
    def run(self, inputs):
        while True:
            time.sleep(60)


class Hungry(Doubling):
    def load(self, folder):
        np.ones(2**23).sum()
        return self.run


@dataclass(frozen=True, kw_only=True)
class Failing(Doubling):
    """Does what it should not, in the step that is asked for."""

    step: str = "request"
    how: str = "raise"

    def compile(self, graph, folder):
        self.misbehave("compile")

    def load(self, folder):
        self.misbehave("load")
        return self.run

    def run(self, inputs):
        self.misbehave("request")
        return 2 * inputs

    def misbehave(self, step):
        if step != self.step:
            return
        if self.how == "raise":
            raise MemoryError("std::bad_alloc")
        if self.how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(3600)
        eaten = []
        while self.how == "eat":
            eaten.append(np.ones(2**19))  # 4 MB, all of it touched
        if self.how == "child eats":
            script = "eaten = []" + chr(10) + "while True: eaten.append(bytearray(2**22))"
            print(subprocess.Popen([sys.executable, "-c", script]).wait())


class Spawning(Doubling):
    """Dies and leaves a child behind."""

    def start(self):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid

    def load(self, folder):
        (folder / "child").write_text(str(self.start()))
        os._exit(4)


class Forking(Spawning):
    """Leaves a child that holds all of its pipes open."""

    def start(self):
        child = os.fork()
        if child == 0:
            time.sleep(3600)
        return child


class Short(Doubling):
    def run(self, inputs):
        return inputs[:1]


class Shy(Doubling):
    def run(self, inputs):
        raise RuntimeError(f"shape {inputs.shape}")


class Curious(Doubling):
    """Tells what it sees of the process that serves it."""

    def run(self, inputs):
        seen = {
            "torch": "torch" in sys.modules,
            "group": os.getpgid(0),
            "cpus": sorted(os.sched_getaffinity(0)),
            "threads": os.environ["OMP_NUM_THREADS"],
            "path": sys.path[: len(os.environ["PYTHONPATH"].split(os.pathsep))],
        }
        raise RuntimeError(repr(seen))


class Locked(Doubling):
    """Refuses to run unless somebody holds the measuring lock."""

    def run(self, inputs):
        import tempfile

        from filelock import FileLock, Timeout

        try:
            FileLock(os.path.join(tempfile.gettempdir(), "hasten-measuring.lock")).acquire(timeout=0)
        except Timeout:
            return super().run(inputs)
        raise RuntimeError("measured without the lock")
'''


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test's measuring lock is its own, here and in the workers."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Makes a compiled folder that declares one of the fakes."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "fake_engines.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(modules))

    def declare(name: str, **knobs: Any) -> Path:
        folder = tmp_path / "-".join([name, *map(str, knobs.values())])
        folder.mkdir(exist_ok=True)
        (folder / "engine.json").write_text(json.dumps({"_target_": f"fake_engines.{name}", **knobs}))
        return folder

    return declare
