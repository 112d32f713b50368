"""What this machine's processor can do, as far as it decides how a graph is compiled or quantized."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_ISA = re.compile(r"(?:avx|amx|asimd|sve).*|sse4_2|fma|f16c|i8mm|bf16")
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def has_vnni() -> bool:
    """Whether products of 8-bit integers are summed in 32 bits at once: AVX-512 or AVX VNNI, AMX, ARM's dot product.

    Other x86 processors add pairs of products in 16 bits, which saturates with 8-bit weights (vpmaddubsw).
    """
    return not _VNNI.isdisjoint(isa())


def has_bfloat16() -> bool:
    """Whether products of bfloat16 numbers are summed by instructions: AVX-512 or AMX BF16, ARM's BF16.

    Other processors turn them into 32-bit floats first, which is slower than to have these from the start.
    """
    return not _BFLOAT16.isdisjoint(isa())


@cache
def isa() -> tuple[str, ...]:
    """The vector extensions that decide which kernels run, sorted, as Linux names them; empty where unknown."""
    words = _field("flags") or _field("Features")
    return tuple(sorted(word for word in words.split() if _ISA.fullmatch(word)))


def float_formats() -> tuple[str, ...]:
    """Floats that the processor calculates in, by instructions of its own: float32, and of bfloat16 and float16 what it
    has. A format that it only converts (F16C) is none."""
    here = set(isa())
    known = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
    return ("float32", *(name for name, extensions in known.items() if here & extensions))


def usable_cpus() -> frozenset[int]:
    """The logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores that this process may use: hyperthreads of one core count once, and a container's quota is kept."""
    cores = {min(siblings(cpu)) for cpu in usable_cpus()}
    quota, _, period = _text(CPU_QUOTA).partition(" ")
    allowed = int(quota) // int(period) if quota.isdigit() and period.strip().isdigit() else len(cores)
    return max(1, min(len(cores), allowed))


def siblings(cpu: int) -> frozenset[int]:
    """The hardware threads of the CPU's core, itself included."""
    listed = _text(TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip()
    spans = [span.split("-") for span in listed.split(",") if span]
    return frozenset({cpu} | {number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)})


@cache
def model_name() -> str:
    """The processor as it calls itself."""
    return _field("model name") or platform.processor() or platform.machine()


def _field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty where there is none."""
    lines = _text(CPUINFO).splitlines()
    values = (value for key, _, value in (line.partition(":") for line in lines) if key.strip() == name)
    return next(values, "").strip()


def _text(file: Path) -> str:
    """Of a file of the system; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
