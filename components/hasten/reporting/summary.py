"""`summary.json`, and the sentences that every report shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hasten.core.trial import Quality, Result, Trial
from hasten.reporting import quality, units
from hasten.reporting.facts import finite

BETTER = {
    "throughput": "surely serve more rows per second",
    "size": "smaller",
    "memory": "surely smaller in memory",
}
"""What nothing that was tried made of the model, by what was optimised; `surely faster` for every latency."""


def to_json(result: Result) -> dict[str, Any]:
    """The result as strict JSON: a figure that is not finite is null.

    `overrides` are the best recipe's, `rebuild` is the command that makes it again, `seconds` the recorded cost of all
    stages, also of those that came from the store, and `spent` the wall time of this run. `shares` says what each of
    the steps that led to the best gave, `requests` what the best takes for the other requests of the target.
    """
    certificate = result.certificate.to_dict()
    summary = {
        "experiment": result.experiment,
        "baseline": result.baseline.to_dict(),
        "best": result.best.to_dict(),
        "overrides": list(result.best.overrides),
        "rebuild": result.best.rebuild,
        "speedup": {reference: asdict(ratio) for reference, ratio in result.speedup.items()},
        "engine_reference": result.engine_reference,
        "requests": [{"request": each.name, **asdict(each)} for each in result.requests],
        "size_ratio": result.size_ratio,
        "certificate": certificate,
        "trials": [trial.to_dict() for trial in result.trials],
        "shares": [{"trial": step.number, "tried": tried(step), "gain": gain} for step, gain in result.shares],
        "front": list(result.front),
        "stopped": result.stopped,
        "binding": result.binding,
        "optimize": result.optimize,
        "warnings": list(result.warnings),
        "machine": dict(result.machine),
        "model_folder": result.model_folder,
        "tracking": result.tracking_command,
        "seconds": result.seconds,
        "spent": result.spent,
    }
    plain: dict[str, Any] = finite(summary)
    return plain


def tried(trial: Trial) -> str:
    """What an iteration tried: its overrides, without a group's choice where one of that group's knobs follows.

    But for engines, several of which have the same knobs.
    """
    if trial.number == 0:
        return "baseline"
    keys = [override.partition("=")[0] for override in trial.edit]
    told = [
        override
        for override, key in zip(trial.edit, keys, strict=True)
        if key == "engine" or not any(other.rpartition(".")[0] == key for other in keys)
    ]
    return " ".join(told) or trial.strategy


def addressed(trial: Trial, trials: Mapping[int, Trial]) -> str:
    """The bottleneck of the recipe that the iteration edited; the baseline shows its own."""
    edited = trials.get(trial.parent, trial) if trial.parent is not None else trial
    return edited.diagnosis.bottleneck if edited.diagnosis is not None else trial.bottleneck


def shares_told(result: Result) -> str:
    """`engine=onnxruntime 3.20x, then quantization=static 2.50x`; empty where one step gave it all."""
    found = result.shares
    return ", then ".join(f"{tried(step)} {units.ratio(gain)}" for step, gain in found) if len(found) > 1 else ""


def claim(result: Result) -> str:
    """The whole result in one sentence that says no more than was measured and certified."""
    if result.best.number == result.baseline.number:
        if len(result.trials) == 1 and result.stopped == "interrupted":
            return f"{result.experiment} was interrupted before anything was tried."
        better = BETTER.get(result.optimize, "surely faster")
        told = f"Nothing that was tried makes {result.experiment} {better} inside its constraints."
        engine = result.speedup.get("engine")
        if engine is None or engine.high >= 1:
            return told
        return f"{told} As it is, it runs {units.digits(1 / engine.value)} times as fast in {result.engine_reference}."
    parts = [*([_speed_claim(result)] if result.speedup else []), _size_claim(result.size_ratio)]
    if result.optimize == "size":
        parts.reverse()
    if result.optimize == "memory":
        parts.append(_memory_claim(result))
    return f"{result.experiment} {', '.join(parts)}, {_quality_claim(result)}."


def _speed_claim(result: Result) -> str:
    eager = result.speedup["eager"]
    interval = f"between {units.digits(eager.low)} and {units.digits(eager.high)}"
    if result.optimize == "throughput":
        return f"serves {units.digits(eager.value)} times as many rows per second as eager PyTorch ({interval})"
    return f"runs {units.digits(eager.value)} times as fast as in eager PyTorch ({interval})"


def _size_claim(ratio: float) -> str:
    return f"is {units.digits(ratio)} times smaller" if ratio >= 1 else f"is {units.digits(1 / ratio)} times larger"


def _memory_claim(result: Result) -> str:
    before, after = result.baseline.evaluation, result.best.evaluation
    assert before is not None
    assert after is not None
    return f"takes {units.size(after.memory_bytes)} of memory instead of {units.size(before.memory_bytes)}"


def _quality_claim(result: Result) -> str:
    certificate = result.certificate
    if not certificate.checked:
        return "and nothing has checked its quality"
    metrics = quality.constrained(certificate.metrics)
    names = " and ".join(each.drop.subject(name) if each.drop else name for name, each in metrics.items())
    if not certificate.held:
        return f"but it is not certified that its {names} {'hold' if len(metrics) > 1 else 'holds'}"
    return f"and its {' and its '.join(_certified(name, each) for name, each in metrics.items())}"


def _certified(name: str, judged: Quality) -> str:
    drop, verb = judged.drop, "drop" if judged.higher_is_better else "rise"
    assert drop is not None  # what was compared with nothing is not held
    change = f"not to {verb}" if drop.bound <= 0 else f"to {verb} by at most {drop.told(drop.bound)}"
    return f"{drop.subject(name)} is certified {change}"
