"""Whether an engine works here: a tiny network compiled in a process of its own, and one request held against eager."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.errors import EngineError
from hasten.core.interfaces import INPUT, Graph, Input, Signature, Target

if TYPE_CHECKING:
    import torch

SIGNATURE = Signature(inputs=(Input(shape=(1, 4, 4)),), output_shape=(3,))
NUM_ROWS = 4
TOLERANCE = 0.05
"""Largest difference from eager PyTorch, as a share of the range of its outputs. It tells a wrong engine from a right
one of coarse numbers; how exact a float engine is, it asks itself whenever it compiles."""


def tiny() -> torch.nn.Module:
    """A convolution, a ReLU and a linear layer, with the same weights every time, in eval mode."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3)]
        return torch.nn.Sequential(*layers).eval()


def write_tiny(folder: Path) -> Graph:
    """The tiny network in the forms that engines read.

    Raises:
        PassError: it can't be captured.
    """
    from hasten.artefacts.capture import write_graph
    from hasten.artefacts.module import save

    module, graph = folder / "module", folder / "graph"
    for path in (module, graph):
        path.mkdir(parents=True)
    model = tiny()
    save(module, {"_target_": f"{__name__}.tiny"}, model)
    return write_graph(model, module, SIGNATURE, {INPUT: _rows()}, graph)


def try_engine(engine: Mapping[str, Any], graph: Graph, target: Target) -> float:
    """Compiles the tiny network and asks it once.

    Args:
        engine: the engine's config node.

    Returns:
        Seconds that it took.

    Raises:
        EngineError: the engine failed, crashed, hung, or gave other outputs than eager PyTorch.
    """
    import torch

    from hasten.evidence.process import Worker
    from hasten.evidence.worker import write_inputs

    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="hasten-") as scratch,
        Worker.of(target) as worker,
    ):
        compiled, outputs = Path(scratch) / "compiled", Path(scratch) / "outputs.npy"
        compiled.mkdir()
        worker.compile(engine, graph, compiled)
        worker.load(compiled)
        worker.predict(write_inputs(Path(scratch) / "inputs.npz", [_rows()]), outputs, batch_size=1)
        given = np.load(outputs)
    with torch.inference_mode():
        expected = tiny()(torch.from_numpy(_rows())).numpy()
    if given.shape != expected.shape:
        raise EngineError(f"it gives outputs of shape {given.shape}, eager PyTorch {expected.shape}")
    error = float(np.abs(given - expected).max() / np.ptp(expected))
    if not error <= TOLERANCE:  # NaN is refused, too
        raise EngineError(f"its outputs differ from eager PyTorch's by {error:.1%} of their range")
    return time.monotonic() - start


def _rows() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(NUM_ROWS, *SIGNATURE.inputs[0].shape)).astype(np.float32)
