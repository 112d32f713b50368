"""A made-up optimisation with the shape of a real one: accepted, rejected and failed trials, long reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from hasten.core.trial import (
    Certificate,
    Drop,
    Evaluation,
    Interval,
    OperatorGroup,
    Profile,
    Quality,
    RequestLatency,
    Result,
    Trial,
    Verdict,
)

ROOFS = {
    "float32_gops": 92.0,
    "bfloat16_gops": 150.0,
    "int8_gops": 310.0,
    "l1_gbs": 210.0,
    "l2_gbs": 95.0,
    "l3_gbs": 48.0,
    "dram_gbs": 17.0,
}
NOTE = "the first and the last layer <stay> float"
QUALITY = 0.9844
LATENCY_MS = 3.12
ENGINE = "engine=onnxruntime"
PRUNED = ("pruning=structured", "pruning.sparsity=0.5")
BASE = (
    ("student=same", "distillation=none", "pruning=none", "quantization=none", "engine=eager"),
    (),
    "baseline",
    "accepted",
    LATENCY_MS,
    QUALITY,
    4_390_000,
    "the untouched model in eager PyTorch",
)
STEPS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, Verdict, float | None, float, int, str], ...] = (
    BASE,
    ((ENGINE,), (ENGINE,), "engine", "accepted", 1.31, 0.9844, 4_360_000, "2.38x faster than trial 0 [2.31, 2.46]"),
    (
        ("engine=openvino",),
        ("engine=openvino",),
        "engine",
        "rejected",
        1.36,
        0.9844,
        4_420_000,
        "not surely faster than trial 1: 0.96x [0.93, 1.01] where at least 1.02x is asked for (objective.min_gain)",
    ),
    (
        (*PRUNED, ENGINE),
        PRUNED,
        "structured_pruning",
        "accepted",
        0.452,
        0.9822,
        1_140_000,
        "2.90x faster than trial 1 [2.81, 2.99]; accuracy drops by at most 1.31 points at 99.6 % confidence",
    ),
    (
        ("pruning=structured", "pruning.sparsity=0.75", ENGINE),
        ("pruning=structured", "pruning.sparsity=0.75"),
        "structured_pruning",
        "rejected",
        0.181,
        0.9511,
        330_000,
        "accuracy may drop by 5.62 points, at most 2.00 are allowed (objective.max_drop): observed 3.33",
    ),
    (
        ("pruning=structured", "pruning.sparsity=0.625", ENGINE),
        ("pruning.sparsity=0.625",),
        "structured_pruning",
        "rejected",
        0.300,
        0.9711,
        650_000,
        "cannot be certified below 2.64 points with 450 rows, at most 2.00 are allowed (objective.max_drop)",
    ),
    (
        ("pruning=structured", "pruning.sparsity=0.5", "quantization=static", ENGINE),
        ("quantization=static",),
        "static_int8",
        "rejected",
        0.461,
        0.9800,
        320_000,
        "compressed but not faster: 0.98x [0.95, 1.02] against trial 3",
    ),
    (
        ("pruning=structured", "pruning.sparsity=0.5", "quantization=static", "engine=openvino"),
        ("engine=openvino",),
        "engine",
        "accepted",
        0.247,
        0.9800,
        352_000,
        "1.83x faster than trial 3 [1.77, 1.90]",
    ),
    (
        ("student=resnet", "distillation=soft_labels", "quantization=static", "engine=openvino"),
        ("student=resnet", "distillation=soft_labels"),
        "distill",
        "accepted",
        0.0741,
        0.9778,
        118_000,
        "3.33x faster than trial 7 [3.20, 3.47]",
    ),
    (
        ("student=resnet", "distillation=soft_labels", "quantization=static", "engine=openvino", "engine.threads=2"),
        ("engine.threads=2",),
        "engine_threads",
        "failed",
        None,
        0.0,
        0,
        "ConfigError: engine.threads=2 is more than target.threads=1 allows; ask for target.threads=2 if a request "
        "may use that many",
    ),
    (
        ("student=mlp", "distillation=soft_labels", "engine=openvino"),
        ("student=mlp", "distillation=soft_labels"),
        "distill",
        "rejected",
        0.0302,
        0.3120,
        210_000,
        "accuracy may drop by 70.9 points, at most 2.00 are allowed (objective.max_drop)",
    ),
    (
        ("student=resnet", "student.width=12", "distillation=soft_labels", "quantization=static", "engine=openvino"),
        ("student.width=12",),
        "distill",
        "rejected",
        0.0731,
        0.9776,
        109_000,
        "not surely faster than trial 8: 1.01x [0.97, 1.05] where at least 1.02x is asked for (objective.min_gain)",
    ),
)


def around(value: float, spread: float = 0.03) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def make_profile(latency_ms: float) -> Profile:
    small = latency_ms < 1
    shares = (
        {"compute": 0.41, "memory": 0.12, "overhead": 0.47}
        if small
        else {"compute": 0.74, "memory": 0.09, "overhead": 0.17}
    )
    groups = (
        ("convolution", 14, 0.66, 68_000_000, 5_200_000, "compute"),
        ("elementwise", 22, 0.08, 900_000, 3_900_000, "memory"),
        ("normalization", 14, 0.05, 700_000, 2_800_000, "memory"),
        ("linear", 1, 0.02, 20_000, 50_000, "memory"),
        ("pooling", 1, 0.01, 8_000, 20_000, "memory"),
        ("copy", 3, 0.01, 0, 400_000, "memory"),
    )
    scale = 0.03 if small else 1.0
    return Profile(
        latency_ms=latency_ms,
        operators=tuple(
            OperatorGroup(
                kind=kind,
                calls=calls,
                milliseconds=share * latency_ms,
                share=share,
                flops=round(flops * scale),
                num_bytes=round(num_bytes * scale),
                bound=bound,
                roof_ms=share * latency_ms * 0.4,
            )
            for kind, calls, share, flops, num_bytes, bound in groups
        ),
        shares={**shares, "capacity": 0.0},
        bottleneck=max(shares, key=lambda kind: shares[kind]),
        evidence=(
            "convolutions take 66 % of a request and reach 36 % of the machine's peak",
            "17 % of the time is spent outside of kernels",
        ),
        weight_bytes=4_300_000,
        roofline=ROOFS,
    )


def make_trial(number: int) -> Trial:
    overrides, edit, strategy, verdict, latency_ms, quality, size_bytes, reason = STEPS[number]
    parents = (None, 0, 1, 1, 3, 3, 3, 6, 7, 8, 8, 8)
    evaluation = None
    if latency_ms is not None:
        drop = Drop(value=QUALITY - quality, bound=1.25 * (QUALITY - quality) + 0.0104, confidence=0.996, rows=450)
        best = min(step[4] for step in STEPS[: max(1, number)] if step[3] == "accepted" and step[4] is not None)
        judged = Quality(value=quality, drop=drop if number else None, max_drop=0.02, higher_is_better=True)
        evaluation = Evaluation(
            metric="accuracy",
            quality=quality,
            drop=judged.drop,
            metrics={"accuracy": judged},
            latency_ms={"p50": around(latency_ms), "p90": around(1.1 * latency_ms), "p99": around(1.4 * latency_ms)},
            throughput=around(1000 / latency_ms),
            speedup={"eager": around(LATENCY_MS / latency_ms), "previous": around(best / latency_ms)} if number else {},
            references_ms={},
            size_bytes=size_bytes,
            memory_bytes=212_000_000,
            flops=round(70_000_000 * latency_ms / LATENCY_MS),
            num_parameters=size_bytes // 4,
            integer_share=1.0 if "quantization=static" in overrides else None,
            notes=(NOTE,) if "quantization=static" in overrides else (),
        )
    return Trial(
        number=number,
        parent=parents[number],
        overrides=overrides,
        edit=edit,
        strategy=strategy,
        bottleneck="compute",
        verdict=verdict,
        reason=reason,
        expected_gain=2.0 if number else None,
        measured_gain=None if evaluation is None or not number else evaluation.speedup["previous"].value,
        holds=verdict == "accepted",
        evaluation=evaluation,
        profile=make_profile(latency_ms) if latency_ms is not None and verdict == "accepted" else None,
        seconds=31.0,
        spent=12.0,
        rebuild=" ".join(["hasten --config-dir my_conf run", *overrides]),
    )


def make_result(**changes: Any) -> Result:
    trials = tuple(make_trial(number) for number in range(len(STEPS)))
    result = Result(
        experiment="digits",
        baseline=trials[0],
        best=trials[8],
        trials=trials,
        speedup={"eager": around(42.1), "engine": around(17.7), "previous": around(3.33)},
        size_ratio=37.2,
        certificate=Certificate(
            held=True,
            metric="accuracy",
            baseline=0.9852,
            candidate=0.9796,
            drop=0.0056,
            margin=0.02,
            bound=0.0149,
            confidence=0.95,
            rows=540,
            reads=1,
            metrics={
                "accuracy": Quality(
                    value=0.9796,
                    drop=Drop(value=0.0056, bound=0.0149, confidence=0.95, rows=540),
                    max_drop=0.02,
                    higher_is_better=True,
                )
            },
            statement="On 540 untouched test rows accuracy drops from 98.5 % to 98.0 %; with 95 % confidence the drop "
            "on new rows is at most 1.49 points, where 2.00 points are allowed.",
        ),
        front=(0, 1, 3, 7, 8),
        stopped="no strategy is left",
        binding="objective.max_drop=0.02 refused trial 4, which was 2.5x faster, by 3.62 points",
        engine_reference="onnxruntime",
        seconds=612.0,
        spent=488.0,
        machine={
            "id": "3f9c2a7d10be",
            "processor": "Example CPU 7000 16-Core Processor",
            "logical_cores": 2,
            "isa": ["avx2", "fma"],
            "l1d_bytes": 32_768,
            "l3_bytes": 33_554_432,
            "memory_bytes": 25_000_000_000,
            "system": "Linux",
        },
        model_folder="outputs/2026-11-22/20-31-07/model",
        tracking_command="mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db",
        warnings=("the machine was busy: 1.4 cores were in use by others while trial 6 was measured",),
    )
    return replace(result, **changes)


def make_request(batch_size: int, length: int | None = None) -> RequestLatency:
    return RequestLatency(
        batch_size=batch_size,
        length=length,
        latency_ms={"p50": around(1.8), "p90": around(2.1), "p99": around(2.4)},
        throughput=around(1e3 * batch_size / 1.8),
        speedup={"eager": around(12.0), "engine": around(4.5)},
        references_ms={"eager": around(21.6), "engine": around(8.1)},
    )


@pytest.fixture(scope="session")
def served() -> Result:
    """A result of a target that names other requests, too."""
    return make_result(requests=(make_request(32), make_request(1, 16)))


@pytest.fixture(scope="session")
def result() -> Result:
    return make_result()


def judged_by(result: Result, metrics: Callable[[Trial], Mapping[str, Quality]]) -> Result:
    """The result with other metrics in every trial that was measured."""

    def changed(trial: Trial) -> Trial:
        if trial.evaluation is None:
            return trial
        given = dict(metrics(trial))
        name = next(iter(given), "quality")
        first = given.get(name)
        evaluation = replace(
            trial.evaluation,
            metric=name,
            quality=first.value if first else None,
            drop=first.drop if first else None,
            metrics=given,
        )
        return replace(trial, evaluation=evaluation)

    trials = tuple(changed(trial) for trial in result.trials)
    best = trials[result.best.number]
    return replace(result, trials=trials, baseline=trials[0], best=best)


@pytest.fixture(scope="session")
def unchecked() -> Result:
    """A run that nothing could judge."""
    certificate = Certificate.unchecked("Quality is unchecked: the rows have no labels.")
    return replace(judged_by(make_result(), lambda trial: {}), certificate=certificate)


@pytest.fixture(scope="session")
def forecast() -> Result:
    """A run with an error that should be low, told relative to the baseline, and a score that has a unit of its own."""

    def metrics(trial: Trial) -> dict[str, Quality]:
        error = Drop(value=0.01, bound=0.03 if trial.number == 4 else 0.015, confidence=0.99, rows=300, relative=True)
        error = replace(error, points=False)
        score = Drop(value=0.5, bound=1.25, confidence=0.99, rows=300, points=False)
        shown = trial.number > 0
        return {
            "squared_error": Quality(
                value=0.0123 * (1 + 0.01 * trial.number),
                drop=error if shown else None,
                max_drop=0.02,
                higher_is_better=False,
                points=False,
            ),
            "psnr": Quality(
                value=31.4, drop=score if shown else None, max_drop=2.0, higher_is_better=True, points=False
            ),
        }

    trial = make_trial(8)
    error, score = metrics(trial).values()
    assert error.drop is not None
    assert score.drop is not None
    error = replace(error, value=0.0126, drop=replace(error.drop, value=0.008, bound=0.0111, confidence=0.95, rows=310))
    score = replace(score, value=30.9, drop=replace(score.drop, value=0.3, bound=0.75, confidence=0.95, rows=310))
    certificate = Certificate(
        held=True,
        metric="squared_error",
        baseline=0.0125,
        candidate=0.0126,
        drop=0.008,
        margin=0.02,
        bound=0.0111,
        confidence=0.95,
        rows=310,
        reads=1,
        statement="Held: with 95 % confidence on 310 test rows the squared_error rises by no more than allowed.",
        metrics={"squared_error": error, "psnr": score},
        baselines={"squared_error": 0.0125, "psnr": 31.2},
    )
    return replace(judged_by(make_result(), metrics), certificate=certificate)


@pytest.fixture(scope="session")
def made_up() -> Callable[..., Result]:
    """Builds the result with some of its fields changed."""
    return make_result
