"""What a run that makes training faster shows: sentences, table, page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hasten.core.trial import StepProfile, TrainingEvaluation, TrainingResult, Trial
from hasten.reporting import plots, units
from hasten.reporting.facts import finite, machine_facts
from hasten.reporting.page import page
from hasten.reporting.summary import addressed, tried

LIMITS = (
    "The ratios hold for this machine, these threads and this model. Another processor ranks strategies differently.",
    "Equal loss means: over the compared rows, no more loss than another seed of the baseline might give. Differences "
    "that are smaller than what seeds differ by can't be told.",
    "Losses were compared over one short schedule of the learning rate, not over the whole training.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One iteration as tables show it; every field is text, `notes` is one sentence each."""

    number: str
    tried: str
    bottleneck: str
    verdict: str
    reason: str
    rebuild: str
    rows: str
    plain: str
    previous: str
    expected: str
    step: str
    start: str
    memory: str
    best: bool
    notes: tuple[str, ...]


def claim(result: TrainingResult) -> str:
    """The whole result in one sentence that says no more than was measured."""
    if result.best.number == result.baseline.number:
        if len(result.trials) == 1 and result.stopped == "interrupted":
            return f"{result.experiment} was interrupted before anything was tried."
        return f"Nothing that was tried surely makes the training of {result.experiment} faster at equal loss."
    ratio = result.speedup["plain"]
    between = f"between {units.digits(ratio.low)} and {units.digits(ratio.high)}"
    many = f"{units.digits(ratio.value)} times as many rows per second as its plain script ({between})"
    return f"{result.experiment} trains {many}, at a loss within the spread of the script's seeds."


def table_row(trial: Trial, trials: Mapping[int, Trial], best: int | None = None) -> Row:
    """A trial in words.

    Args:
        trials: the history by number.
        best: number of the best trial.
    """
    found = trial.training
    figures = dict.fromkeys(("rows", "plain", "previous", "step", "start", "memory"), "–")
    if found is not None:
        figures |= {
            "rows": rate(found),
            "step": units.latency(found.step_ms.value),
            "start": units.duration(found.start_seconds),
            "memory": units.size(found.memory_bytes),
        }
        figures |= {name: units.ratio(ratio.value) for name, ratio in found.speedup.items()}
    return Row(
        number=str(trial.number),
        tried=tried(trial),
        bottleneck=addressed(trial, trials),
        verdict=trial.verdict,
        reason=trial.reason,
        rebuild=trial.rebuild,
        expected="–" if trial.expected_gain is None else units.ratio(trial.expected_gain),
        best=trial.number == best,
        notes=found.notes if found is not None else (),
        **figures,
    )


def rate(found: TrainingEvaluation) -> str:
    """`1204 [1190, 1221]` rows per second."""
    value, low, high = (
        units.count(each)
        for each in (found.samples_per_second.value, found.samples_per_second.low, found.samples_per_second.high)
    )
    return f"{value} [{low}, {high}]"


def phases_told(profile: StepProfile) -> str:
    """`data 61 %, forward 12 %, ...`: what is not nothing."""
    shares = {name: time_ms / profile.step_ms for name, time_ms in profile.parts_ms.items()}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def facts(result: TrainingResult) -> list[tuple[str, str]]:
    """What a run ends with, by name."""
    before, after = result.baseline.training, result.best.training
    assert before is not None
    assert after is not None
    told = [("vs plain", units.ratio_interval(result.speedup["plain"]))]
    if len(result.shares) > 1:
        steps = ", then ".join(f"{tried(step)} {units.ratio(gain)}" for step, gain in result.shares)
        told.append(("step by step", steps))
    start = after.references.get("plain", before.samples_per_second)
    told += [
        ("rows per second", f"{units.count(start.value)} -> {units.count(after.samples_per_second.value)}"),
        ("memory", f"{units.size(before.memory_bytes)} -> {units.size(after.memory_bytes)}"),
    ]
    if after.loss is not None:
        told.append(("loss", after.loss.reason))
    told.append(("stopped", result.stopped))
    if result.binding is not None:
        told.append(("binding", result.binding))
    return told


def to_json(result: TrainingResult) -> dict[str, Any]:
    """The result as strict JSON: a figure that is not finite is null."""
    summary = {
        "experiment": result.experiment,
        "optimize": "training",
        "baseline": result.baseline.to_dict(),
        "best": result.best.to_dict(),
        "overrides": list(result.best.overrides),
        "rebuild": result.best.rebuild,
        "command": result.command,
        "speedup": {reference: asdict(ratio) for reference, ratio in result.speedup.items()},
        "trials": [trial.to_dict() for trial in result.trials],
        "shares": [{"trial": step.number, "tried": tried(step), "gain": gain} for step, gain in result.shares],
        "stopped": result.stopped,
        "binding": result.binding,
        "warnings": list(result.warnings),
        "machine": dict(result.machine),
        "tracking": result.tracking_command,
        "seconds": result.seconds,
        "spent": result.spent,
    }
    plain: dict[str, Any] = finite(summary)
    return plain


def report(result: TrainingResult) -> str:
    """The whole page."""
    by_number = {trial.number: trial for trial in result.trials}
    profiles = _profiles(result)
    # The figures come from plots.py, whose SVG writer escapes every text in them.
    return page(
        "training.html",
        result=result,
        claim=claim(result),
        facts=facts(result),
        rows=[table_row(trial, by_number, result.best.number) for trial in result.trials],
        steps=[(str(step.number), tried(step), units.ratio(gain), _reached(step)) for step, gain in result.shares],
        profiles=[(name, profile, phases_told(profile)) for name, profile in profiles],
        paces=plots.training_paces(result),
        phases=plots.step_phases(profiles) if profiles else "",
        losses=plots.losses(result.best.training.loss) if result.best.training and result.best.training.loss else "",
        machine=machine_facts(result.machine),
        limits=(*result.warnings, *LIMITS),
        units=units,
    )


def _reached(trial: Trial) -> str:
    return "" if trial.training is None else rate(trial.training)


def _profiles(result: TrainingResult) -> list[tuple[str, StepProfile]]:
    """Before and after; one of them where nothing was accepted."""
    trials = {"plain script": result.baseline, f"best (trial {result.best.number})": result.best}
    if result.best.number == result.baseline.number:
        trials = {"plain script": result.baseline}
    return [(name, trial.step_profile) for name, trial in trials.items() if trial.step_profile is not None]
