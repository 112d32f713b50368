"""What a trial and a result look like in a tracking store: names, parameters, metrics, tags and descriptions."""

from __future__ import annotations

import math
import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence

from hasten.core.credentials import without_credentials
from hasten.core.trial import (
    Evaluation,
    Interval,
    Profile,
    Quality,
    Result,
    StepProfile,
    TrainingEvaluation,
    TrainingResult,
    Trial,
)

MAX_KEY = 250
"""Characters of a name that MLflow accepts."""
MAX_VALUE = 6000
"""Characters of a parameter's value that MLflow keeps; tags may be longer, but nobody reads that much in a table."""


def key(name: str) -> str:
    """The name with what MLflow refuses in it replaced: other characters than `/\\w.- :`, and paths such as `a//b`."""
    cleaned = re.sub(r"[^/\w.\- :]", "_", name)
    resolved = posixpath.normpath("/" + cleaned).strip("/")
    return resolved[:MAX_KEY] or "_"


def value(text: str) -> str:
    """The text without passwords, shortened to what MLflow keeps."""
    cleaned = without_credentials(text)
    return cleaned if len(cleaned) <= MAX_VALUE else cleaned[: MAX_VALUE - 1] + "…"


def params(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides as parameters, as the user typed them: `+a.b=1` is `a.b: 1`, `~a.b` is `a.b: ~`."""
    split = [override.lstrip("+~").partition("=")[::2] for override in overrides]
    return {key(name): value(given or "~") for name, given in split}


def choices(trial: Trial) -> dict[str, str]:
    """What matters of a trial's recipe, also where it goes without saying, so that runs can be compared by it."""
    return {key(name): value(chosen) for name, chosen in trial.choices.items()}


def trial_name(trial: Trial) -> str:
    """`03 structured pruning 0.5: accepted, 1.8x`; the factor is the speed-up against eager PyTorch, or, of a training,
    against its plain script."""
    words = trial.strategy.replace("_", " ").split() or ["baseline"]
    settings = [override.partition("=")[2] for override in trial.edit]
    tried = " ".join([*words, *(setting for setting in settings if setting not in words)])
    speedup = trial.speedup.get("eager", trial.speedup.get("plain"))
    factor = f", {speedup.value:.1f}x" if speedup is not None and trial.number > 0 else ""
    outcome = f": {trial.verdict}{factor}" if trial.number > 0 else ""
    return f"{trial.number:02d} {tried}{outcome}"


def result_name(name: str, result: Result | TrainingResult) -> str:
    """`digits: 42.1x`, `digits: trains 2.1x`, and what is not proved says so."""
    if isinstance(result, TrainingResult):
        return f"{name}: trains {result.speedup['plain'].value:.1f}x"
    factor = f"{result.speedup['eager'].value:.1f}x" if result.speedup else "emulated"
    return f"{name}: {factor}{'' if result.certificate.held else ', not certified'}"


def result_verdict(result: Result | TrainingResult) -> str:
    if isinstance(result, TrainingResult):
        return "faster" if result.best.number != result.baseline.number else "not faster"
    return "certified" if result.certificate.held else "not certified"


def trial_metrics(trial: Trial) -> dict[str, float]:
    """All figures of a trial; latency in ms, sizes in bytes, time in s, intervals as `_low` and `_high`."""
    figures: dict[str, float | None] = {
        "expected_gain": trial.expected_gain,
        "measured_gain": trial.measured_gain,
        "seconds": trial.seconds,
        "seconds_spent": trial.spent,
    }
    if trial.evaluation is not None:
        figures |= _evaluation_metrics(trial.evaluation)
    if trial.training is not None:
        figures |= _training_metrics(trial.training)
    if trial.step_profile is not None:
        figures |= {f"step_{part}_ms": time_ms for part, time_ms in trial.step_profile.parts_ms.items()}
    return _known(figures)


def result_metrics(result: Result | TrainingResult) -> dict[str, float]:
    """The figures that a run ends with."""
    if isinstance(result, TrainingResult):
        return _training_result_metrics(result)
    certificate = result.certificate
    figures: dict[str, float | None] = {
        "size_ratio": result.size_ratio,
        "certified": float(certificate.held),
        "num_trials": float(len(result.trials)),
        "seconds": result.seconds,
        "seconds_spent": result.spent,
    }
    if certificate.checked:
        figures |= {"test_quality": certificate.candidate, "test_drop": certificate.drop}
        figures |= {"test_drop_bound": certificate.bound}
    for name, quality in certificate.metrics.items():
        if name != certificate.metric:
            figures |= _quality(name, quality, prefix="test_")
    if result.best.evaluation is not None:
        figures |= _evaluation_metrics(result.best.evaluation)
    for reference, ratio in result.speedup.items():
        figures |= _interval(f"speedup_{reference}", ratio)
    for request in result.requests:
        figures |= _interval(f"latency_ms_{request.name}", request.latency_ms["p50"])
        figures |= _interval(f"throughput_{request.name}", request.throughput)
        for reference, ratio in request.speedup.items():
            figures |= _interval(f"speedup_{reference}_{request.name}", ratio)
    return _known(figures)


def curve_points(trial: Trial, best: Trial | None) -> dict[str, float]:
    """What the parent's curves get from one iteration: its own latency and quality, and the best so far."""
    figures: dict[str, float] = {}
    if trial.evaluation is not None:
        if not trial.evaluation.emulated:
            figures["trial_latency_p50_ms"] = trial.evaluation.latency_ms["p50"].value
        if (quality := trial.evaluation.quality) is not None:
            figures["trial_quality"] = quality
    if trial.training is not None:
        figures["trial_samples_per_second"] = trial.training.samples_per_second.value
    if best is not None and best.training is not None:
        figures["best_samples_per_second"] = best.training.samples_per_second.value
    if best is not None and best.evaluation is not None:
        if not best.evaluation.emulated:
            figures["best_latency_p50_ms"] = best.evaluation.latency_ms["p50"].value
        if (quality := best.evaluation.quality) is not None:
            figures["best_quality"] = quality
        figures["best_size_bytes"] = float(best.evaluation.size_bytes)
        if "eager" in best.evaluation.speedup:
            figures["best_speedup_eager"] = best.evaluation.speedup["eager"].value
    return figures


def trial_note(trial: Trial) -> str:
    """The description of an iteration, in markdown: verdict, where the time goes, how it was done, how to rebuild it.

    The UI shows the first lines, and the others where they are asked for.
    """
    lines = [f"**{trial.verdict}**: {trial.reason}"]
    if trial.profile is not None:
        lines += ["", *_profile_note(trial.profile)]
    if trial.step_profile is not None:
        lines += ["", *_step_note(trial.step_profile)]
    measured = trial.evaluation or trial.training
    if measured is not None and measured.notes:
        lines += ["", *(f"- {note}" for note in measured.notes)]
    return "\n".join([*lines, "", *_command(trial.rebuild)])


def _command(rebuild: str) -> list[str]:
    """One override a line, to be pasted: a long line would stretch the page, and hide what stands right of it."""
    words = shlex.split(without_credentials(rebuild))
    lines = [" ".join(words[:2]), *(shlex.quote(word) for word in words[2:])]
    return ["```", " \\\n  ".join(lines), "```"]


def result_note(result: Result | TrainingResult) -> str:
    """The description of a whole run, in markdown."""
    ratios = [f"- {ratio:.2f} times as fast as {reference}" for reference, ratio in result.speedup.items()]
    command = "\n".join(_command(result.best.rebuild))
    steps = [f"- {gain:.2f} times by `{' '.join(step.edit)}` (trial {step.number})" for step, gain in result.shares]
    if isinstance(result, TrainingResult):
        ratios = [f"- {ratio:.2f} times the rows per second of {name}" for name, ratio in result.speedup.items()]
        return "\n".join([*ratios, *steps, "", command])
    notes = [f"- {note}" for note in (result.best.evaluation.notes if result.best.evaluation is not None else ())]
    warnings = [f"- {warning}" for warning in result.warnings]
    return "\n".join([result.certificate.statement, "", *ratios, *steps, *notes, *warnings, "", command])


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        "quality": evaluation.quality,
        "drop": evaluation.drop.value if evaluation.drop is not None else None,
        "drop_bound": evaluation.drop.bound if evaluation.drop is not None else None,
        "size_bytes": evaluation.size_bytes,
        "memory_bytes": None if evaluation.emulated else evaluation.memory_bytes,
        "flops": evaluation.flops,
        "num_parameters": evaluation.num_parameters,
        "integer_share": evaluation.integer_share,
    }
    for name, quality in evaluation.metrics.items():
        if name != evaluation.metric:
            figures |= _quality(name, quality)
    if not evaluation.emulated:
        figures |= _interval("throughput", evaluation.throughput)
        for percentile, latency in evaluation.latency_ms.items():
            figures |= _interval(f"latency_{percentile}_ms", latency)
    for reference, ratio in evaluation.speedup.items():
        figures |= _interval(f"speedup_{reference}", ratio)
    return figures


def _training_metrics(training: TrainingEvaluation) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        "memory_bytes": training.memory_bytes,
        "batch_size": training.batch_size,
        "start_seconds": training.start_seconds,
    }
    figures |= _interval("samples_per_second", training.samples_per_second)
    figures |= _interval("step_ms", training.step_ms)
    for reference, ratio in training.speedup.items():
        figures |= _interval(f"speedup_{reference}", ratio)
    if training.loss is not None:
        figures |= {"loss": training.loss.candidate[-1], "loss_limit": training.loss.limit[-1]}
        figures |= {"loss_baseline": training.loss.baseline[-1]}
    return figures


def _training_result_metrics(result: TrainingResult) -> dict[str, float]:
    figures: dict[str, float | None] = {
        "num_trials": float(len(result.trials)),
        "seconds": result.seconds,
        "seconds_spent": result.spent,
    }
    if result.best.training is not None:
        figures |= _training_metrics(result.best.training)
    for reference, ratio in result.speedup.items():
        figures |= _interval(f"speedup_{reference}", ratio)
    return _known(figures)


def _quality(name: str, quality: Quality, prefix: str = "") -> dict[str, float]:
    """A metric beside the first, under its name."""
    figures = {f"{prefix}quality_{key(name)}": quality.value}
    if quality.drop is not None:
        figures |= {f"{prefix}drop_{key(name)}": quality.drop.value}
        figures |= {f"{prefix}drop_bound_{key(name)}": quality.drop.bound}
    return figures


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(figure) for name, figure in figures.items() if figure is not None and math.isfinite(figure)}


def _interval(name: str, interval: Interval) -> Mapping[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _profile_note(profile: Profile) -> list[str]:
    rows = sorted(profile.operators, key=lambda group: -group.milliseconds)[:6]
    return [
        f"Bottleneck from here on: **{profile.bottleneck}**, at {profile.latency_ms:.4g} ms per request",
        "",
        *(f"- {sentence}" for sentence in profile.evidence),
        "",
        "| operators | share | ms | bound by | roofline ms |",
        "|---|---|---|---|---|",
        *(
            f"| {row.kind} ({row.calls}) | {row.share:.0%} | {row.milliseconds:.4g} | {row.bound} | {row.roof_ms:.4g} |"
            for row in rows
        ),
    ]


def _step_note(profile: StepProfile) -> list[str]:
    return [
        f"Bottleneck from here on: **{profile.bottleneck}**, at {profile.step_ms:.4g} ms per training step",
        "",
        *(f"- {sentence}" for sentence in profile.evidence),
        "",
        "| part of a step | share | ms |",
        "|---|---|---|",
        *(f"| {name} | {ms / profile.step_ms:.0%} | {ms:.4g} |" for name, ms in profile.parts_ms.items()),
        *_collectives_note(profile),
    ]


def _collectives_note(profile: StepProfile) -> list[str]:
    if not profile.collectives:
        return []
    return [
        "",
        "| collectives | bytes | ms | waited for, ms |",
        "|---|---|---|---|",
        *(
            f"| {each.kind} ({each.calls:.3g}) | {each.num_bytes} | {each.milliseconds:.4g} | {each.waited_ms:.4g} |"
            for each in profile.collectives
        ),
    ]
