"""The machine as far as it decides timings, read from /proc and /sys; what a system does not tell stays None."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.core.cuda import Gpu, gpus
from hasten.core.processor import isa, model_name

X86 = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_tile",),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "float16": ("avx512_fp16", "amx_fp16"),
}
"""Vector extensions of x86 -> the names that Linux gives them; one of each line suffices."""


def extensions(isa: Collection[str]) -> tuple[str, ...]:
    """Those of `X86` that a processor has."""
    return tuple(name for name, names in X86.items() if set(names) & set(isa))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One computer.

    Attributes:
        processor: model name.
        logical_cores: of the machine, not of this process, so that a pinned worker names the same machine.
        isa: vector extensions that decide which kernels run, sorted.
        l1d_bytes: data cache of one core; None where unknown.
        l2_bytes: of one core or cluster; None where there is none or it is unknown.
        l3_bytes: as one core sees it; None where there is none or it is unknown.
        memory_bytes: physical memory; None where unknown.
        gpus: NVIDIA GPUs, in the order of the driver.
        visible_gpus: those of them that processes started from here may use, as CUDA_VISIBLE_DEVICES says it; None for
            all.
    """

    processor: str
    logical_cores: int
    isa: tuple[str, ...]
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    memory_bytes: int | None
    system: str
    kernel: str
    python: str
    gpus: tuple[Gpu, ...] = ()
    visible_gpus: str | None = None

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of what decides timings: processor, cores, vector extensions, caches, and where
        there are GPUs their models, compute capabilities and driver, and which of them may be used."""
        caches = (self.l1d_bytes, self.l2_bytes, self.l3_bytes)
        decisive: list[Any] = [self.processor, self.logical_cores, self.isa, caches]
        if self.gpus:
            decisive += [[(gpu.name, gpu.driver, gpu.capability) for gpu in self.gpus], self.visible_gpus]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def machine(root: Path = Path("/")) -> Machine:
    """This machine.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    caches = _caches(root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cache")
    return Machine(
        processor=model_name() or "unknown",
        logical_cores=os.cpu_count() or 1,
        isa=isa(),
        l1d_bytes=caches.get(1),
        l2_bytes=caches.get(2),
        l3_bytes=caches.get(3),
        memory_bytes=_memory(root / "proc" / "meminfo"),
        system=platform.system(),
        kernel=platform.release(),
        python=platform.python_version(),
        gpus=gpus(),
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def machine_id() -> str:
    """The `id` of this machine."""
    return machine().id


def _caches(folder: Path) -> Mapping[int, int]:
    """Level -> bytes of the caches that hold data."""
    sizes: dict[int, int] = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if level.isdigit() and kind in {"Data", "Unified"} and (num_bytes := _bytes(size)):
            sizes[int(level)] = num_bytes
    return sizes


def _bytes(size: str) -> int | None:
    """32768 for `32K`."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    digits = size.rstrip("KMG")
    return int(digits) * units.get(size[len(digits) :], 1) if digits.isdigit() else None


def _memory(meminfo: Path) -> int | None:
    for line in _read(meminfo).splitlines():
        key, _, value = line.partition(":")
        if key == "MemTotal":
            return int(value.split()[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
