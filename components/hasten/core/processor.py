"""What this machine's processor can do, as far as it decides how a graph is compiled or quantized."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

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


@cache
def model_name() -> str:
    """The processor as it calls itself."""
    return _field("model name") or platform.processor() or platform.machine()


def _field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (value for key, _, value in (line.partition(":") for line in lines) if key.strip() == name)
    return next(values, "").strip()
