"""What every engine asks before it accepts a target and after it has compiled a float graph."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Runner, Target

TOLERANCE = 1e-3
"""Largest difference between an engine's float outputs and eager PyTorch's, as a share of the range of the latter."""


def unavailable(library: str, threads: int, target: Target) -> str | None:
    """Why an engine of this library can't serve the target with so many threads; None if it can."""
    if find_spec(library) is None:
        return f"{library} is not installed: pip install {library}"
    if target.device != "cpu":
        return f"{library} runs on the CPU here, target.device is {target.device}"
    if threads > target.threads:
        return f"engine.threads={threads} is more than target.threads={target.threads} allows"
    return None


def check_parity(run: Runner, graph: Graph, engine: str, batch_size: int | None = None) -> None:
    """Compares a compiled float graph with the reference outputs.

    Args:
        batch_size: rows per call; None for all at once. Where the reference has fewer, its rows are repeated.

    Raises:
        EngineError: the outputs differ by more than `TOLERANCE`, with the figures.
    """
    from safetensors.numpy import load_file

    reference = load_file(graph.reference)
    rows = len(reference["inputs"])
    size = batch_size or rows
    order = np.arange(max(rows, size)) % rows
    calls = [order[start : start + size] for start in range(0, len(order), size)]
    outputs_BC = np.concatenate([run(reference["inputs"][call]) for call in calls])
    expected_BC = reference["outputs"][order]
    if outputs_BC.shape != expected_BC.shape:
        raise EngineError(f"{engine} gives outputs of shape {outputs_BC.shape}, eager PyTorch {expected_BC.shape}")
    scale = float(np.ptp(expected_BC)) or float(np.abs(expected_BC).max()) or 1.0
    error = float(np.abs(outputs_BC - expected_BC).max()) / scale
    if not error <= TOLERANCE:  # NaN is refused, too
        raise EngineError(
            f"{engine} differs from eager PyTorch by {error:.2%} of the output range on {rows} rows; "
            f"{TOLERANCE:.2%} is allowed"
        )
