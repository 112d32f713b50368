"""The end of a run: the certificate on untouched rows, the result, and what the run leaves on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hasten.artefacts.deployed import deploy
from hasten.core.construct import locate
from hasten.core.credentials import plain_without_credentials, without_credentials
from hasten.core.errors import HastenError
from hasten.core.files import read_json, write_json, write_text
from hasten.core.interfaces import Signature
from hasten.core.objective import binding
from hasten.core.trial import Certificate, Evaluation, Interval, RequestLatency, Result, Trial
from hasten.evidence.worker import ENGINE_FILE
from hasten.hardware.machine import machine
from hasten.reporting.measures import Measure, measure
from hasten.reporting.summary import to_json

if TYPE_CHECKING:
    from hasten.session import Candidate, Session, UntouchedEngine

MODEL_FOLDER = "model"
MUCH_STARVED = 0.1
"""Share of rounds that another process disturbed from which on the reader is warned."""


def conclude(session: Session, best: Candidate, *, engine: UntouchedEngine, stopped: str) -> Result:
    """Certifies the best candidate, deploys it, writes `summary.json` and `report.html` and closes the record."""
    from hasten.reporting.html import report

    baseline = session.candidates[0]
    certificate = session.request_bench.certify(baseline.built, best.built)
    requests, untimed = _other_requests(session, best, engine)
    folder = session.folder / MODEL_FOLDER
    result = Result(
        experiment=session.name,
        baseline=baseline.trial,
        best=best.trial,
        trials=tuple(candidate.trial for candidate in session.candidates),
        speedup=_speedup(best.evaluation, engine),
        size_ratio=baseline.evaluation.size_bytes / best.evaluation.size_bytes,
        certificate=certificate,
        front=front([each.trial for each in session.candidates], session.objective.optimize, best=best.trial.number),
        optimize=session.objective.optimize,
        stopped=stopped,
        binding=binding(best.evaluation, session.objective),
        engine_reference=engine.name,
        seconds=sum(candidate.trial.seconds for candidate in session.candidates),
        spent=time.monotonic() - session.started,
        machine=asdict(machine()),
        model_folder=str(folder),
        tracking_command=session.tracker.command(),
        warnings=(*_warnings(certificate, best.evaluation), *untimed),
        requests=requests,
    )
    _deploy(session, best, result)
    _keep_placement(session, best)
    write_json(session.folder / "summary.json", plain_without_credentials(to_json(result)), sort_keys=False)
    write_text(session.folder / "report.html", without_credentials(report(result)))
    _draw(session, result)
    session.tracker.finish(result, session.folder, "FINISHED")
    return result


def _draw(session: Session, result: Result) -> None:
    """The report's figures as pages of their own, which a tracking UI shows."""
    from hasten.reporting import plots
    from hasten.reporting.page import picture

    figures = {"front": plots.front(result), "iterations": plots.best_over_iterations(result)}
    for name, svg in figures.items():
        if svg:
            write_text(session.folder / "plots" / f"{name}.html", without_credentials(picture(name, svg)))


def front(trials: Sequence[Trial], optimize: str = "p50", *, best: int) -> tuple[int, ...]:
    """Numbers of the trials that no other beats in what is optimised and in quality at once.

    Quality is the first metric's. Where nothing judged the outputs only what is optimised counts. `best` is always
    among them: a trial whose figures are better broke a limit, or the loop could not show it to be better.
    """
    optimised = measure(optimize)
    places = {trial.number: _place(trial.evaluation, optimised) for trial in trials if trial.evaluation is not None}
    return tuple(
        number
        for number, mine in places.items()
        if number == best or not any(_dominates(it, mine) for it in places.values())
    )


def _place(evaluation: Evaluation, optimised: Measure) -> tuple[float, float]:
    """Cost and quality, both the better the lower."""
    quality = evaluation.metrics.get(evaluation.metric)
    sign = 0 if quality is None else -1 if quality.higher_is_better else 1
    return optimised.cost(evaluation), sign * (quality.value if quality is not None else 0.0)


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _speedup(evaluation: Evaluation, engine: UntouchedEngine) -> Mapping[str, Interval]:
    return evaluation.speedup if evaluation.speedup or evaluation.emulated else _of_the_baseline(engine)


def _of_the_baseline(engine: UntouchedEngine) -> dict[str, Interval]:
    """The ratios where nothing was accepted: the baseline is as fast as itself, and slower than its best engine."""
    itself, ratio = Interval(value=1.0, low=1.0, high=1.0), engine.speedup
    slower = Interval(value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low)
    return {"eager": itself, "engine": slower, "previous": itself}


def _warnings(certificate: Certificate, evaluation: Evaluation) -> list[str]:
    warnings = []
    if certificate.reads > 1:
        artefacts = f"{certificate.reads} different artefacts"
        warnings.append(f"the test rows have certified {artefacts} by now: they are no longer untouched")
    if not certificate.held:
        warnings.append("the quality is not certified")
    if evaluation.starved > MUCH_STARVED:
        rounds = f"{evaluation.starved:.0%} of the timed rounds"
        warnings.append(
            f"the machine was busy: in {rounds} another process had the CPU, which lengthens long requests more"
        )
    return warnings


def _other_requests(
    session: Session, best: Candidate, engine: UntouchedEngine
) -> tuple[tuple[RequestLatency, ...], list[str]]:
    """What the best takes for the requests of `target.also`, and why some could not be timed."""
    references = {"eager": session.candidates[0].built, "engine": engine.built}
    timed: list[RequestLatency] = []
    untimed = []
    for place, request in enumerate(session.target.also):
        try:
            timed.append(session.request_bench.other_request(request, best.built, references))
        except HastenError as error:
            untimed.append(f"target.also[{place}] could not be timed: {' '.join(str(error).split())}")
    return tuple(timed), untimed


def _deploy(session: Session, best: Candidate, result: Result) -> None:
    from hasten.data.prepare import read
    from hasten.reporting.card import Facts, card
    from hasten.stages.data import COLUMNS

    prepared = read(best.built.data.folder)
    provenance: dict[str, Any] = {
        "overrides": list(best.recipe.overrides),
        "rebuild": result.best.rebuild,
        "stages": dict(best.trial.stages),
        "certificate": result.certificate.to_dict(),
        "latency_ms": best.trial.to_dict()["evaluation"]["latency_ms"],
        "machine": result.machine,
        "data": {"fingerprint": prepared.fingerprint, "rows": dict(prepared.num_rows)},
    }
    signature = Signature.from_dict(read_json(best.built.entries["export"].folder / "signature.json"))
    columns = read_json(best.built.data.folder / COLUMNS)
    engine = read_json(best.built.compiled.folder / ENGINE_FILE)
    facts = Facts(
        data=best.recipe.option("data"),
        fingerprint=prepared.fingerprint,
        num_rows=prepared.num_rows,
        class_counts=prepared.class_counts,
        transforms=prepared.transforms,
        notes=prepared.notes,
        task=best.recipe.option("task"),
        columns=columns,
        signature=signature,
        engine=engine,
        threads=session.target.threads,
        batch_size=session.target.batch_size,
        calibration_rows=best.recipe.section("quantization").get("calibration_rows") or None,
        trust=_to_trust(best, engine, prepared.transforms),
    )
    deploy(
        best.built.compiled.folder,
        session.folder / MODEL_FOLDER,
        columns=columns,
        signature=signature,
        engine=engine,
        transforms=prepared.transforms,
        provenance=plain_without_credentials(provenance),
        card=without_credentials(card(result, facts)),
    )


def _keep_placement(session: Session, best: Candidate) -> None:
    """How the model was shared out, where it has several devices."""
    from hasten.reporting.placement import PLACEMENT, write_chart

    file = best.built.compiled.folder / PLACEMENT
    if file.is_file():
        found = read_json(file)
        write_json(session.folder / PLACEMENT, found)
        write_chart(found, session.folder)


def _to_trust(best: Candidate, engine: Mapping[str, Any], transforms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `hasten.load` has to be told to trust: packages that are not ours, and compiled machine code."""
    parts = [device["engine"] for device in engine.get("between", ())]
    named = [engine["_target_"], *(node["_target_"] for node in (*parts, *transforms))]
    module = best.built.compiled.folder / "module.json"
    if module.is_file():
        named.append(read_json(module)["arch"]["_target_"])
    packages = sorted({str(target).partition(".")[0] for target in named} - {"hasten"})
    native = any(locate(node["_target_"], "engine").native_code for node in (engine, *parts))
    return [*packages, *(["native code"] if native else [])]
