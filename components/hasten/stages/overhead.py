"""Measures what an engine costs before it calculates anything, on two chains of operators with nothing to do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import save
from hasten.core.interfaces import INPUT, Input, Signature, Target
from hasten.evidence import latency
from hasten.evidence.process import Worker
from hasten.evidence.worker import write_inputs
from hasten.hardware.overhead import CHAIN_INPUT_SHAPE, Overhead, chain, fit_overhead

LENGTHS = (4, 24)
"""Links of the two chains."""


def measure_overhead(
    engine: Mapping[str, Any], target: Target, protocol: latency.LatencyProtocol, seed: int
) -> Overhead:
    """Compiles the chains for the engine and times them in turns.

    Raises:
        EngineError: the engine failed on a chain.
    """
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        compiled = {length: _compiled(length, engine, target, Path(scratch) / str(length)) for length in LENGTHS}
        row = np.zeros((target.batch_size, *CHAIN_INPUT_SHAPE), np.float32)
        operators = [_num_operators(folder, row, target) for folder in compiled.values()]
        short, long = compiled.values()
        measured = latency.measure(short, {"long": long}, target, [row], protocol, seed)
    medians_us = [
        1e3 * latency.latency_ms(measured, protocol.confidence, participant)["p50"].value
        for participant in (latency.CANDIDATE, "long")
    ]
    return fit_overhead(operators, medians_us)


def _compiled(length: int, engine: Mapping[str, Any], target: Target, folder: Path) -> Path:
    module, graph, compiled = folder / "module", folder / "graph", folder / "compiled"
    for path in (module, graph, compiled):
        path.mkdir(parents=True)
    model = chain(length)
    save(module, {"_target_": "hasten.hardware.overhead.chain", "length": length}, model)
    signature = Signature(inputs=(Input(shape=CHAIN_INPUT_SHAPE),), output_shape=CHAIN_INPUT_SHAPE)
    rows = {INPUT: np.zeros((2, *CHAIN_INPUT_SHAPE), np.float32)}
    captured = write_graph(model, module, signature, rows, graph)
    with Worker.of(target) as worker:
        worker.compile(engine, captured, compiled)
    return compiled


def _num_operators(compiled: Path, row: np.ndarray[Any, Any], target: Target) -> float:
    """Operators that one request launches, by the engine's own profiler: it may have fused some."""
    pinned = Worker.of(target, latency.measuring_cpus(target.threads))
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch, pinned as worker:
        request = write_inputs(Path(scratch) / "request.npz", [row])
        return sum(operator.calls for operator in worker.operators(compiled, request, repeats=10))
