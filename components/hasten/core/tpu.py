"""The TPUs of this machine and whether PyTorch could use them, without importing it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
CHIPS = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})
"""PCI numbers of TPUs from v2 to 7x; the vendor's network cards have others (`jax._src.hardware_utils`, JAX 0.10)."""


def tpu_problem() -> str | None:
    """Why PyTorch can't calculate on a TPU here; None where it can, as far as can be told without asking it."""
    if find_spec("torch_xla") is None:
        return "torch_xla is not installed (its newest release, 2.9, is for torch 2.9)"
    if not num_tpus():
        return f"no TPU is seen here (in {PCI})"
    return None


@cache
def num_tpus() -> int:
    """Chips on the PCI bus."""
    found = ((_text(file), _text(file.with_name("device"))) for file in PCI.glob("*/vendor"))
    return sum(vendor == GOOGLE and device in CHIPS for vendor, device in found)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
