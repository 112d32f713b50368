"""The end of a run: the certificate on untouched rows, the result, and what the run leaves on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hasten.artefacts.deployed import deploy
from hasten.core.files import write_json, write_text
from hasten.core.interfaces import Signature
from hasten.core.objective import binding
from hasten.core.trial import Certificate, Evaluation, Interval, Result
from hasten.hardware.machine import machine
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
    certificate = session.bench.certify(baseline.built, best.built)
    folder = session.folder / MODEL_FOLDER
    result = Result(
        experiment=str(session.recipe.config["name"]),
        baseline=baseline.trial,
        best=best.trial,
        trials=tuple(candidate.trial for candidate in session.candidates),
        speedup=best.evaluation.speedup or _of_the_baseline(engine),
        size_ratio=baseline.evaluation.size_bytes / best.evaluation.size_bytes,
        certificate=certificate,
        front=front(session.candidates),
        stopped=stopped,
        binding=binding(best.evaluation, session.objective),
        engine_reference=engine.name,
        seconds=sum(candidate.trial.seconds for candidate in session.candidates),
        spent=time.monotonic() - session.started,
        machine=asdict(machine()),
        model_folder=str(folder),
        tracking_command=session.tracker.command(),
        warnings=tuple(_warnings(certificate, best.evaluation)),
    )
    _deploy(session, best, result)
    write_json(session.folder / "summary.json", to_json(result))
    write_text(session.folder / "report.html", report(result))
    session.tracker.finish(result, session.folder, "FINISHED")
    return result


def front(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Numbers of the trials that no other beats in latency and quality at once."""
    measured = [(candidate.trial.number, candidate.trial.evaluation) for candidate in candidates]
    points = [(number, evaluation) for number, evaluation in measured if evaluation is not None]
    return tuple(number for number, mine in points if not any(_dominates(other, mine) for _, other in points))


def _dominates(one: Evaluation, other: Evaluation) -> bool:
    faster = other.latency_ms["p50"].value - one.latency_ms["p50"].value
    better = one.quality - other.quality
    return faster >= 0 and better >= 0 and (faster > 0 or better > 0)


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


def _deploy(session: Session, best: Candidate, result: Result) -> None:
    from hasten.data.prepare import read

    prepared = read(best.built.data.folder)
    provenance: dict[str, Any] = {
        "overrides": list(best.recipe.overrides),
        "rebuild": result.best.rebuild,
        "stages": dict(best.trial.stages),
        "certificate": result.certificate.to_dict(),
        "latency_ms": best.trial.to_dict()["evaluation"]["latency_ms"],
        "machine": result.machine,
        "data": {"fingerprint": prepared.fingerprint, "classes": prepared.num_classes},
    }
    deploy(
        best.built.compiled.folder,
        session.folder / MODEL_FOLDER,
        signature=Signature(input_shape=prepared.input_shape, output_shape=(prepared.num_classes,)),
        engine=best.recipe.section("engine"),
        mean=prepared.mean,
        std=prepared.std,
        provenance=provenance,
    )
