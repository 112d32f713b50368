"""A small run as the loop would record it, and one MLflow store that the session's tests share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hasten.artefacts.deployed import deploy
from hasten.core.interfaces import Input, Signature
from hasten.core.trial import (
    Certificate,
    Drop,
    Evaluation,
    Interval,
    OperatorGroup,
    Profile,
    Quality,
    Result,
    Trial,
)


def interval(value: float) -> Interval:
    return Interval(value=value, low=value * 0.9, high=value * 1.1)


def make_evaluation(latency_ms: float, quality: float, speedup: float | None) -> Evaluation:
    drop = None if speedup is None else Drop(value=0.99 - quality, bound=1.0 - quality, confidence=0.996, rows=450)
    return Evaluation(
        metric="accuracy",
        quality=quality,
        drop=drop,
        metrics={"accuracy": Quality(value=quality, drop=drop, max_drop=0.02, higher_is_better=True)},
        latency_ms={"p50": interval(latency_ms), "p90": interval(1.2 * latency_ms), "p99": interval(1.5 * latency_ms)},
        throughput=interval(1000 / latency_ms),
        speedup={} if speedup is None else {"eager": interval(speedup), "previous": interval(speedup)},
        references_ms={},
        size_bytes=4_000_000,
        memory_bytes=300_000_000,
        flops=80_000_000,
        num_parameters=1_000_000,
    )


def make_trial(number: int, **changes: Any) -> Trial:
    profile = Profile(
        latency_ms=3.0,
        operators=(
            OperatorGroup(
                kind="convolution",
                calls=9,
                milliseconds=2.4,
                share=0.8,
                flops=70_000_000,
                num_bytes=2_000_000,
                bound="compute",
                roof_ms=0.9,
            ),
        ),
        shares={"compute": 0.7, "memory": 0.1, "overhead": 0.2},
        bottleneck="compute",
        evidence=("70 % of the time is arithmetic",),
        weight_bytes=4_000_000,
    )
    fields: dict[str, Any] = {
        "number": number,
        "parent": number - 1 if number else None,
        "overrides": (),
        "edit": (),
        "strategy": "baseline",
        "bottleneck": "compute",
        "verdict": "accepted",
        "reason": "the baseline",
        "evaluation": make_evaluation(3.0, 0.99, None),
        "profile": profile,
        "seconds": 20.0,
        "spent": 2.0,
        "holds": True,
        "choices": {"engine": "eager", "pruning": "none", "student": "same"},
    }
    fields |= changes
    return Trial(**{"rebuild": shlex.join(["hasten", "run", *fields["overrides"]])} | fields)


@pytest.fixture(scope="session")
def trials() -> tuple[Trial, ...]:
    return (
        make_trial(0),
        make_trial(
            1,
            strategy="structured_pruning",
            edit=("pruning=structured", "pruning.sparsity=0.5"),
            overrides=("pruning=structured", "pruning.sparsity=0.5", "data.path=s3://me:hunter2@bucket/a"),
            reason="1.8 times as fast, drop at most 0.4 points",
            expected_gain=2.0,
            measured_gain=1.8,
            evaluation=make_evaluation(1.65, 0.988, 1.8),
        ),
        make_trial(
            2,
            strategy="static_int8",
            edit=("quantization=static",),
            overrides=("quantization=static", "pruning=structured"),
            verdict="rejected",
            reason="compressed but not faster",
            evaluation=make_evaluation(1.9, 0.98, 1.6),
        ),
        make_trial(
            3,
            strategy="engine",
            edit=("engine=openvino",),
            overrides=("engine=openvino",),
            choices={"engine": "openvino", "pruning": "none", "student": "same"},
            verdict="failed",
            reason="EngineError: unsupported operator " + "x" * 9000,
            evaluation=None,
            profile=None,
        ),
    )


@pytest.fixture(scope="session")
def result(trials: Sequence[Trial]) -> Result:
    return Result(
        experiment="digits",
        baseline=trials[0],
        best=trials[1],
        trials=tuple(trials),
        speedup={"eager": interval(1.8), "engine": interval(1.1), "previous": interval(1.8)},
        size_ratio=2.5,
        certificate=Certificate(
            held=True,
            metric="accuracy",
            baseline=0.99,
            candidate=0.987,
            drop=0.003,
            margin=0.02,
            bound=0.012,
            confidence=0.95,
            rows=540,
            reads=1,
            metrics={
                "accuracy": Quality(
                    value=0.987,
                    drop=Drop(value=0.003, bound=0.012, confidence=0.95, rows=540),
                    max_drop=0.02,
                    higher_is_better=True,
                )
            },
            statement="accuracy drops by at most 1.2 points (95 % confidence, 540 test rows)",
        ),
        front=(0, 1),
        stopped="no strategy is left",
        binding=None,
        engine_reference="onnxruntime",
        seconds=80.0,
        spent=8.0,
        machine={"processor": "made up"},
        model_folder="model",
        tracking_command=None,
    )


def _compiled(folder: Path) -> Path:
    """What an engine would have left: a product with a constant matrix."""
    weights = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "weights")
    rows, outputs = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", width))
        for name, width in (("input", 4), ("output", 3))
    )
    product = onnx.helper.make_node("MatMul", ["input", "weights"], ["output"])
    graph = onnx.helper.make_graph([product], "product", [rows], [outputs], [weights])
    folder.mkdir()
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        folder / "model.onnx",
    )
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    deploy(
        _compiled(folder / "compiled"),
        folder / "model",
        columns={"input": (4,)},
        signature=Signature(inputs=(Input(shape=(4,)),), output_shape=(3,)),
        engine={"_target_": "hasten.engines.onnxruntime.OnnxRuntime", "threads": 1, "graph_optimization": "all"},
        transforms=[],
        provenance={},
        card="# A product\n",
    )
    (folder / "summary.json").write_text("{}")
    (folder / "report.html").write_text("<html></html>")
    return folder
