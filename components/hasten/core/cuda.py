"""The NVIDIA GPUs of this machine and whether PyTorch was built to use them, without importing it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia")
QUERY = ("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")
SECONDS_TO_ANSWER = 20
BFLOAT16_FROM = (8, 0)
FLOAT16_FROM = (5, 3)
"""Compute capabilities from which on a GPU calculates in these formats (CUDA C++ Programming Guide, table 5.1)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_bytes: None where it is unknown.
        driver: version of NVIDIA's driver; empty where it is unknown.
        capability: compute capability, major and minor; None where it is unknown.
    """

    name: str
    memory_bytes: int | None = None
    driver: str = ""
    capability: tuple[int, int] | None = None

    @property
    def float_formats(self) -> tuple[str, ...]:
        """Floats that it calculates in; of a GPU of unknown capability all."""
        least = {"bfloat16": BFLOAT16_FROM, "float16": FLOAT16_FROM}
        return (
            "float32",
            *(name for name, since in least.items() if self.capability is None or self.capability >= since),
        )


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that processes of this user may see: by nvidia-smi, or by /proc where that is missing."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    return _by_nvidia_smi() or _by_proc()


def process_bytes(process: int) -> int | None:
    """GPU memory that a process holds, by the driver; None where the driver does not know a process of that number."""
    answer = _nvidia_smi("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    pairs = [line.replace(" ", "").split(",") for line in answer.splitlines()]
    found = [int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == str(process) and pair[1].isdigit()]
    return sum(found) * 2**20 if found else None


def cuda_problem() -> str | None:
    """Why PyTorch can't calculate on a GPU here; None where it can, as far as can be told without asking it."""
    if not gpus():
        return "no NVIDIA GPU is seen here (neither by nvidia-smi nor in /proc/driver/nvidia)"
    if torch_cuda() is None:
        return "PyTorch is installed without CUDA: install a build of https://pytorch.org/get-started that has it"
    return None


@cache
def torch_cuda() -> str | None:
    """The version of CUDA that the installed PyTorch was built for, from the file that says so; None for none."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*= *['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return match[1] if match else None


def _by_nvidia_smi() -> tuple[Gpu, ...]:
    return tuple(_gpu(line) for line in _nvidia_smi(*QUERY).splitlines() if line.count(",") == 3)


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi answers; nothing where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _gpu(line: str) -> Gpu:
    """From `NVIDIA H100, 81559, 550.54.15, 9.0`: the memory is in MiB."""
    name, memory, driver, capability = (part.strip() for part in line.split(","))
    major, _, minor = capability.partition(".")
    return Gpu(
        name=name,
        memory_bytes=int(memory) * 2**20 if memory.isdigit() else None,
        driver=driver,
        capability=(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None,
    )


def _by_proc() -> tuple[Gpu, ...]:
    files = sorted(DRIVER.glob("gpus/*/information"))
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", _text(DRIVER / "version"))
    models = (re.search(r"^Model: *(.+)$", _text(file), flags=re.MULTILINE) for file in files)
    return tuple(Gpu(name=it[1].strip() if it else "unknown", driver=version[0] if version else "") for it in models)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
