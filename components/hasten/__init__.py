"""Makes a PyTorch model fast enough, small enough and still right on the hardware that will run it, and proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.artefacts.deployed import load
    from hasten.notebook import optimize, run

__version__ = "0.1.0"
__all__ = ["load", "optimize", "run"]


def __getattr__(name: str) -> Any:
    """Imports what a notebook asks for when it asks, so that the command line starts without torch."""
    from importlib import import_module

    if name == "load":
        return import_module("hasten.artefacts.deployed").load
    if name in ("optimize", "run"):
        return getattr(import_module("hasten.notebook"), name)
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")
