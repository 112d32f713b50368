"""What a run leaves that makes training faster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from hasten.core.credentials import plain_without_credentials, without_credentials
from hasten.core.files import write_json, write_text
from hasten.core.training_objective import binding
from hasten.core.trial import Interval, TrainingResult
from hasten.hardware.machine import machine
from hasten.reporting.training import report, to_json

if TYPE_CHECKING:
    from hasten.session import Candidate, Session


def conclude_training(session: Session, best: Candidate, *, stopped: str) -> TrainingResult:
    """Writes `summary.json` and `report.html` and closes the record."""
    assert best.trial.training is not None
    baseline = session.candidates[0]
    result = TrainingResult(
        experiment=session.name,
        baseline=baseline.trial,
        best=best.trial,
        trials=tuple(candidate.trial for candidate in session.candidates),
        speedup=_speedup(best.trial.training.speedup),
        stopped=stopped,
        binding=binding(best.trial.training, session.training_objective),
        command=session.rebuild_command(best.recipe, speeds="requests"),
        seconds=sum(candidate.trial.seconds for candidate in session.candidates),
        spent=time.monotonic() - session.started,
        machine=asdict(machine()),
        tracking_command=session.tracker.command(),
    )
    write_json(session.folder / "summary.json", plain_without_credentials(to_json(result)), sort_keys=False)
    write_text(session.folder / "report.html", without_credentials(report(result)))
    session.tracker.finish(result, session.folder, "FINISHED")
    return result


def _speedup(measured: Mapping[str, Interval]) -> Mapping[str, Interval]:
    """Where nothing was accepted the baseline is as fast as itself."""
    itself = Interval(value=1.0, low=1.0, high=1.0)
    return measured or {"plain": itself, "previous": itself}
