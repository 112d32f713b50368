"""What every engine asks before it accepts a target and after it has compiled a float graph."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.cuda import cuda_problem
from hasten.core.errors import EngineError
from hasten.core.interfaces import Engine, Graph, Input, Runner, Target
from hasten.core.processor import has_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCES: Mapping[str, float] = MappingProxyType({"float32": 1e-3, "bfloat16": 5e-2})
"""Precision -> largest difference between an engine's float outputs and eager PyTorch's in float32, as a share of the
range of the latter. The mantissa of bfloat16 has 8 bits, so that each rounding is off by up to 0.4 %, and those of a
dozen layers add up; what that costs in quality, the loop measures."""


THREADS = (1, 2, 4, 8, 16)
"""Numbers of threads worth trying, as far as the target allows them: small requests are faster on fewer."""


def unavailable(engine: Engine, library: str, target: Target) -> str | None:
    """Why an engine of this library can't serve the target with its settings; None if it can."""
    if find_spec(library) is None:
        wanted = f"'hasten[{engine.extra}]'" if engine.extra else engine.libraries[0]
        return f"{engine.libraries[0]} is not installed: pip install {wanted}"
    if target.device not in engine.devices:
        return f"{engine.family} runs on {' or '.join(engine.devices)}, target.device is {target.device}"
    device, place = getattr(engine, "device", None), {"cpu": "cpu", "gpu": "cuda"}.get(target.device)
    is_reference = engine.family == "eager" and device == target.reference
    if device and place and device != place and not is_reference:
        return f"engine.device={device} is not where target.device={target.device} runs, which is {place}"
    if device == "cuda" and (reason := cuda_problem()):
        return f"engine.device=cuda can't be had: {reason}"
    threads = getattr(engine, "threads", 1)
    if threads > target.threads:
        return f"engine.threads={threads} is more than target.threads={target.threads} allows"
    precision = getattr(engine, "precision", "float32")
    if precision not in target.precisions:
        return f"engine.precision={precision} is none of target.precisions={', '.join(target.precisions)}"
    if precision == "float16" and device == "cpu":
        return "engine.precision=float16 is for a GPU (engine.device=cuda)"
    if precision == "bfloat16" and target.device == "cpu" and not has_bfloat16():
        return "engine.precision=bfloat16 is slower than float32 on this processor, which has no instructions for it"
    return None


def check_parity(
    run: Runner,
    graph: Graph,
    engine: str,
    batch_size: int | None = None,
    precision: str = "float32",
    tolerances: Mapping[str, float] = TOLERANCES,
) -> None:
    """Compares a compiled float graph with the reference outputs and, where an axis is dynamic, with eager PyTorch.

    Args:
        batch_size: rows per call; None for all at once. Where the reference has fewer, its rows are repeated.
        precision: that the engine calculates in.
        tolerances: precision -> largest difference that is allowed, as of `TOLERANCES`.

    Raises:
        EngineError: the outputs differ by more than the tolerance, with the figures.
    """
    from safetensors.numpy import load_file

    reference = load_file(graph.reference)
    inputs = {name: reference[f"inputs.{name}"] for name in graph.signature.names}
    rows = len(reference["outputs"])
    size = batch_size or rows
    order = np.arange(max(rows, size)) % rows
    calls = [order[start : start + size] for start in range(0, len(order), size)]
    outputs = np.concatenate([run(*(values[call] for values in inputs.values())) for call in calls])
    tolerance = tolerances[precision]
    _compare(outputs, reference["outputs"][order], engine, f"{rows} rows", tolerance)
    if any(each.dynamic for each in graph.signature.inputs):
        shorter = {each.name: _halved(each, inputs[each.name][order[:size]]) for each in graph.signature.inputs}
        expected = _eager_outputs(graph, shorter)
        _compare(run(*shorter.values()), expected, engine, f"{len(expected)} rows of half the length", tolerance)


def fused(engine: str, exported: int, run: int) -> str:
    """What constant folding and fusion made of the exported graph, in a sentence for the report."""
    return f"{engine} runs {run} operators where the exported graph has {exported}"


def _compare(outputs: NDArray[Any], expected: NDArray[Any], engine: str, what: str, tolerance: float) -> None:
    if outputs.shape != expected.shape:
        raise EngineError(f"{engine} gives outputs of shape {outputs.shape}, eager PyTorch {expected.shape}")
    scale = float(np.ptp(expected)) or float(np.abs(expected).max()) or 1.0
    error = float(np.abs(outputs - expected).max()) / scale
    if not error <= tolerance:  # NaN is refused, too
        raise EngineError(
            f"{engine} differs from eager PyTorch by {error:.2%} of the output range on {what}; "
            f"{tolerance:.2%} is allowed"
        )


def _halved(source: Input, rows: NDArray[Any]) -> NDArray[Any]:
    """The rows up to the middle of each dynamic axis: a capture may have taken the greatest length for a constant."""
    for axis in source.dynamic:
        rows = rows.take(range(max(1, rows.shape[axis + 1] // 2)), axis + 1)
    return rows


def _eager_outputs(graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    import torch

    from hasten.artefacts.module import forward, rebuild

    with torch.inference_mode():
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in inputs.items()}
        outputs: NDArray[Any] = forward(rebuild(graph.module), tensors).numpy()
    return outputs
