"""`hasten report run=<id>`: makes the report of a run again from what MLflow has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hasten.core import restore
from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_text
from hasten.core.trial import Certificate, Evaluation, Result, TrainingResult, Trial
from hasten.outcome import front
from hasten.reporting import html, training
from hasten.session import Session
from hasten.tracking.reading import Recorded, Records, trials_of

SECTIONS = ("pipeline", "tracking", "run", "hydra", "experiment", "debug")


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request without its recipe, which has been run already."""
    return Session.of_part(overrides, SECTIONS, folder)


def main(session: Session) -> int:
    """The command; its exit code.

    Raises:
        ConfigError: no run was named, or none is found by that name.
        HastenError: nothing was measured in it.
    """
    wanted = session.recipe.config["run"]
    if wanted is None:
        raise ConfigError("run has no value and needs one: run=<id, name or folder of a run>")
    result = of_folder(Path(wanted)) if Path(wanted).is_dir() else of_record(Records.of(session.mlflow.uri), wanted)
    page = html.report(result) if isinstance(result, Result) else training.report(result)
    file = session.folder / "report.html"
    write_text(file, without_credentials(page))
    print(f"{result.experiment}: {len(result.trials)} trials, {file}")
    return 0


def of_folder(folder: Path) -> Result | TrainingResult:
    """What a run left."""
    file = folder / "summary.json"
    if not file.is_file():
        raise ConfigError(f"run={folder} has no summary.json: name the run, and MLflow is asked")
    return restore.result(read_json(file))


def of_record(records: Records, wanted: str) -> Result | TrainingResult:
    """What MLflow has of a run; of an iteration the whole that it belongs to."""
    found = records.find(wanted, "run")
    while found.parent:
        found = records.get(found.parent)
    summary = records.json(found.run, "summary.json")
    return restore.result(summary) if summary is not None else unfinished(records, found)


def unfinished(records: Records, found: Recorded) -> Result:
    """What there is of a run that ended before it had a result: its trials, and no certificate.

    Raises:
        HastenError: it has no trial that was measured.
    """
    trials = tuple(map(restore.trial, trials_of(records, found.run)))
    if not trials or trials[0].evaluation is None:
        raise HastenError(
            f"{found.name} ({found.run[:8]}) ended before anything was measured: there is nothing to report"
        )
    best = [trial for trial in trials if trial.verdict == "accepted"][-1]
    config = OmegaConf.to_container(OmegaConf.create(records.text(found.run, "config.yaml") or "{}"))
    optimize = config.get("objective", {}).get("optimize", "p50") if isinstance(config, Mapping) else "p50"
    return _without_end(found, trials, best, str(optimize))


def _without_end(found: Recorded, trials: tuple[Trial, ...], best: Trial, optimize: str) -> Result:
    first, last = _measured(trials[0]), _measured(best)
    facts: dict[str, Any] = {"run": found.run, "status": found.status.lower()}
    return Result(
        experiment=found.name,
        baseline=trials[0],
        best=best,
        trials=trials,
        speedup=last.speedup,
        size_ratio=first.size_bytes / last.size_bytes,
        certificate=Certificate.unchecked("It ended before the test rows were read: nothing is certified"),
        front=front(trials, optimize, best=best.number),
        stopped=f"{found.status.lower()} before it had a result",
        binding=None,
        engine_reference="its best engine",
        seconds=sum(trial.seconds for trial in trials),
        spent=sum(trial.spent for trial in trials),
        machine=facts,
        model_folder="",
        tracking_command=None,
        warnings=("this report was made from the trials alone, as the run ended before it had a result",),
        optimize=optimize,
    )


def _measured(trial: Trial) -> Evaluation:
    assert trial.evaluation is not None
    return trial.evaluation
