"""`report.html`: one file that holds everything and loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.trial import Profile, Result, Trial
from hasten.reporting import plots, quality, units
from hasten.reporting.facts import machine_facts
from hasten.reporting.measures import measure
from hasten.reporting.page import page
from hasten.reporting.summary import addressed, claim, tried

LIMITS = (
    "The ratios hold for this machine, these threads and this batch size. Another processor ranks engines differently.",
    "The front shows validation rows, which all trials looked at; only the certificate is read from untouched rows.",
    "The certificate speaks of rows like the test rows. Rows from elsewhere, or from later, may behave differently.",
    "Latency is the model's alone: what reads, decodes and transports a request comes on top of it.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One iteration as the report's table shows it; every field is text, `notes` is one sentence each."""

    number: str
    tried: str
    bottleneck: str
    verdict: str
    reason: str
    rebuild: str
    latency: str
    eager: str
    previous: str
    quality: str
    bound: str
    others: str
    size: str
    expected: str
    marked: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One of the steps that led to the best: what it set, what it gave, and where that led."""

    number: str
    tried: str
    gain: str
    reached: str
    size: str
    quality: str


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One of the ratios, with what it is measured against."""

    name: str
    value: str
    interval: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Served:
    """One of the other requests: its latency before and after, rows per second, ratios to eager and best engine."""

    request: str
    eager: str
    latency: str
    rows: str
    ratios: tuple[str, ...]


def report(result: Result) -> str:
    """The whole page."""
    profiles = _profiles(result)
    # The figures come from plots.py, whose SVG writer escapes every text in them.
    return page(
        "report.html",
        result=result,
        claim=claim(result),
        certificate=result.certificate,
        certified=quality.certified(result.certificate),
        metric=result.baseline.evaluation.metric if result.baseline.evaluation is not None else "quality",
        bound_unit=quality.bound_unit(result.trials),
        judged=_judged(result),
        rows=_rows(result),
        ratios=_ratios(result),
        optimised=measure(result.optimize).name,
        steps=_steps(result),
        size=_size(result),
        requests=_requests(result),
        profiles=profiles,
        machine=machine_facts(result.machine),
        limits=(*result.warnings, *_rereads(result), *LIMITS),
        front=plots.front(result),
        iterations=plots.best_over_iterations(result),
        bars=plots.profiles(profiles) if profiles else "",
        rooflines=plots.rooflines(profiles) if any(profile.roofline for _, profile in profiles) else "",
        units=units,
    )


def _rows(result: Result) -> list[Row]:
    by_number = {trial.number: trial for trial in result.trials}
    return [_row(trial, by_number, result) for trial in result.trials]


def _row(trial: Trial, by_number: Mapping[int, Trial], result: Result) -> Row:
    evaluation = trial.evaluation
    marks = ("best",) if trial.number == result.best.number else ()
    figures = {"latency": "–", "eager": "–", "previous": "–", "quality": "–", "bound": "–", "size": "–", "others": ""}
    if evaluation is not None:
        ratios = {name: units.ratio(ratio.value) for name, ratio in evaluation.speedup.items()}
        figures |= {name: ratios[name] for name in ("eager", "previous") if name in ratios}
        latency = units.latency_interval(evaluation.latency_ms["p50"])
        figures["latency"] = "emulated" if evaluation.emulated else latency
        figures["quality"] = quality.told(evaluation)
        figures["size"] = units.size(evaluation.size_bytes)
        figures["others"] = "; ".join(map(quality.sentence, quality.others(evaluation)))
        if bound := quality.bound(evaluation):
            figures["bound"] = f"≤ {bound}"
    return Row(
        number=str(trial.number),
        tried=tried(trial),
        bottleneck=addressed(trial, by_number),
        verdict=trial.verdict,
        reason=trial.reason,
        rebuild=trial.rebuild,
        expected="–" if trial.expected_gain is None else units.ratio(trial.expected_gain),
        marked=", ".join((*marks, *(("on the front",) if trial.number in result.front else ()))),
        notes=evaluation.notes if evaluation is not None else (),
        **figures,
    )


def _steps(result: Result) -> list[Step]:
    """What each step from the baseline to the best gave."""
    optimised = measure(result.optimize)
    return [
        Step(
            number=str(step.number),
            tried=tried(step),
            gain=units.ratio(gain),
            reached=optimised.told(optimised.of(step.evaluation).value),
            size=units.size(step.evaluation.size_bytes),
            quality=quality.told(step.evaluation),
        )
        for step, gain in result.shares
        if step.evaluation is not None
    ]


def _ratios(result: Result) -> list[Ratio]:
    meanings = {
        "eager": (
            "against eager PyTorch",
            "What a user gains who calls the model as it is today. Part of it is the engine's merit.",
        ),
        "engine": (
            f"against the untouched model in {result.engine_reference}",
            "What is left once the model as it is runs in its best engine: the merit of changing the model.",
        ),
        "previous": ("against the best trial before", "What the last accepted step added."),
    }
    return [
        Ratio(
            name=meanings[name][0],
            value=units.ratio(ratio.value),
            interval=f"{units.ratio(ratio.low)} to {units.ratio(ratio.high)}",
            meaning=meanings[name][1],
        )
        for name in meanings
        if (ratio := result.speedup.get(name)) is not None
    ]


def _requests(result: Result) -> list[Served]:
    return [
        Served(
            request=each.told,
            eager=units.latency_interval(each.references_ms["eager"]) if "eager" in each.references_ms else "–",
            latency=units.latency_interval(each.latency_ms["p50"]),
            rows=units.count(each.throughput.value),
            ratios=tuple(
                units.ratio_interval(each.speedup[name]) if name in each.speedup else "–"
                for name in ("eager", "engine")
            ),
        )
        for each in result.requests
    ]


def _size(result: Result) -> str:
    before, after = result.baseline.evaluation, result.best.evaluation
    if before is None or after is None:
        return ""
    return f"{units.size(before.size_bytes)} → {units.size(after.size_bytes)}"


def _judged(result: Result) -> list[quality.Line]:
    """Every metric of the best trial on the validation rows, beside the baseline's."""
    before, after = result.baseline.evaluation, result.best.evaluation
    if before is None or after is None:
        return []
    return quality.lines(after.metrics, {name: each.value for name, each in before.metrics.items()})


def _profiles(result: Result) -> list[tuple[str, Profile]]:
    """Before and after; one of them where nothing was accepted."""
    trials = {"baseline": result.baseline, f"best (trial {result.best.number})": result.best}
    if result.best.number == result.baseline.number:
        trials = {"baseline": result.baseline}
    return [(name, trial.profile) for name, trial in trials.items() if trial.profile is not None]


def _rereads(result: Result) -> tuple[str, ...]:
    reads = result.certificate.reads
    if reads <= 1:
        return ()
    return (f"{reads} different artefacts have been certified on these test rows: they are no longer untouched.",)
