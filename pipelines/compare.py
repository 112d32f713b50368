"""`hasten compare runs=[a,b]`: two runs side by side, with a paired verdict on their latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hasten.core import restore
from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_text
from hasten.core.interfaces import Target
from hasten.core.store import Store
from hasten.core.trial import Interval, Trial
from hasten.hardware.machine import Machine, machine_id
from hasten.reporting.comparison import Pairing, Side, compared, differences, figures
from hasten.session import Session
from hasten.stages import pairing
from hasten.tracking.reading import Records

SECTIONS = ("pipeline", "tracking", "runs", "hydra", "experiment", "debug")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One of the two, with what is known of how it was measured.

    Attributes:
        baseline: trial 0 of its run; None where it is not known.
        config: its run's.
    """

    side: Side
    baseline: Trial | None
    config: Mapping[str, Any]

    @property
    def trial(self) -> Trial:
        return self.side.trial

    @property
    def finished(self) -> pairing.Finished:
        return pairing.Finished(store=Store(Path(self.config["store"]["folder"])), keys=self.trial.stages)

    @property
    def machine(self) -> str | None:
        """Id of the machine that it was measured on; None where nobody wrote it down."""
        return restore.restore(Machine, self.side.machine).id if self.side.machine else None


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request without its recipe: both have been run already."""
    return Session.of_part(overrides, SECTIONS, folder)


def main(session: Session) -> int:
    """The command; its exit code.

    Raises:
        ConfigError: not two runs were named, or one is not found.
        HastenError: one of them has nothing that was measured.
    """
    wanted = session.recipe.config["runs"]
    if len(wanted) != 2:
        raise ConfigError(
            f"runs must name two runs, got {len(wanted)}: runs=[<id, name or folder>,<id, name or folder>]"
        )
    first, second = (_of_folder(Path(each)) if Path(each).is_dir() else _of_record(session, each) for each in wanted)
    screen = session.screen
    with screen:
        found = pair(first, second, session)
    columns = ("", f"1: {first.side.name}", f"2: {second.side.name}")
    screen.table("what differs", columns, [list(line) for line in differences(first.trial, second.trial)])
    screen.table("what was measured", columns, [list(line) for line in figures(first.trial, second.trial)])
    screen.lines([found.verdict, found.how])
    file = session.folder / "compare.html"
    write_text(file, without_credentials(compared(first.side, second.side, found)))
    print(file)
    return 0


def pair(first: Chosen, second: Chosen, session: Session) -> Pairing:
    """How much faster the second is, by the best evidence that there is."""
    one, other = first.trial, second.trial
    for trial, name in ((one, "first"), (other, "second")):
        if trial.evaluation is None and trial.training is None:
            return Pairing(ratio=None, how=f"The {name} was not measured: {trial.reason}")
    if one.evaluation is None or other.evaluation is None:
        return _by_way_of_plain(first, second)
    if one.evaluation.emulated or other.evaluation.emulated:
        return Pairing(ratio=None, how="An emulated device has no latency that could be compared.")
    if one.stages.get("compile") and one.stages.get("compile") == other.stages.get("compile"):
        same = Interval(value=1.0, low=1.0, high=1.0)
        return Pairing(ratio=same, how="Both are one and the same artefact, which is as fast as itself.")
    if (first.config["target"], first.machine) != (second.config["target"], second.machine):
        differ = "targets" if first.config["target"] != second.config["target"] else "machines"
        return Pairing(ratio=None, how=f"They were measured on different {differ}: their times can't be compared.")
    confidence = float(first.config["objective"]["confidence"])
    target, seed = Target.of(first.config["target"]), int(first.config["seed"])
    if ratio := pairing.stored(first.finished, second.finished, target, confidence, seed, first.machine):
        return Pairing(ratio=ratio, how="Paired: they were measured in turns, block beside block, in one session.")
    if first.machine in (None, machine_id()):
        try:
            ratio = pairing.measured(first.finished, second.finished, target, confidence, seed, session.screen)
        except HastenError as error:
            return _by_way_of_eager(first, second, f"Measuring both now failed: {' '.join(str(error).split())}. ")
        if ratio is not None:
            return Pairing(ratio=ratio, how="Paired: both were measured in turns just now, block beside block.")
        return _by_way_of_eager(
            first, second, "The store no longer has both artefacts, so they can't be measured now. "
        )
    return _by_way_of_eager(first, second, "They were measured on another machine than this one. ")


def _by_way_of_eager(first: Chosen, second: Chosen, why: str) -> Pairing:
    baselines = [it.baseline.stages.get("compile") if it.baseline else None for it in (first, second)]
    one, other = first.trial.speedup.get("eager"), second.trial.speedup.get("eager")
    if one is None or other is None or baselines[0] is None or baselines[0] != baselines[1]:
        return Pairing(
            ratio=None, how=f"{why}Their intervals are of different sessions, and nothing stands between them."
        )
    told = "Not paired: each was measured in turns with the same model in eager PyTorch, in sessions of their own"
    return Pairing(ratio=_quotient(other, one), how=f"{why}{told}; the interval is as wide as both allow.")


def _by_way_of_plain(first: Chosen, second: Chosen) -> Pairing:
    """Of trainings."""
    baselines = [it.baseline.overrides if it.baseline else None for it in (first, second)]
    one, other = first.trial.speedup.get("plain"), second.trial.speedup.get("plain")
    comparable = baselines[0] is not None and baselines[0] == baselines[1] and first.machine == second.machine
    if one is None or other is None or not comparable:
        return Pairing(ratio=None, how="They were not measured against the same plain script on one machine.")
    told = "Not paired: each was measured in turns with the same plain script, in sessions of their own"
    return Pairing(ratio=_quotient(other, one), how=f"{told}; the interval is as wide as both allow.")


def _quotient(one: Interval, other: Interval) -> Interval:
    return Interval(value=one.value / other.value, low=one.low / other.high, high=one.high / other.low)


def _of_folder(folder: Path) -> Chosen:
    summary, config = folder / "summary.json", folder / "config.yaml"
    if not (summary.is_file() and config.is_file()):
        raise ConfigError(
            f"runs: {folder} has no summary.json and config.yaml: it is no folder of a run that has ended"
        )
    result = restore.result(read_json(summary))
    side = Side(name=folder.name, where=str(folder), trial=result.best, machine=result.machine)
    return Chosen(side=side, baseline=result.baseline, config=_config(config.read_text(encoding="utf-8")))


def _of_record(session: Session, wanted: str) -> Chosen:
    records = Records.of(session.mlflow.uri)
    found = records.find(wanted, "runs")
    written = records.json(found.run, "trial.json")
    if found.parent and written is None:  # a training inside of an iteration
        found = records.get(found.parent)
        written = records.json(found.run, "trial.json")
    parent = records.get(found.parent) if found.parent else found
    summary, config = records.json(parent.run, "summary.json"), records.text(parent.run, "config.yaml")
    result = restore.result(summary) if summary is not None else None
    if config is None or (written is None and result is None):
        raise HastenError(f"runs: {found.name} ({found.run[:8]}) has ended before anything was measured")
    trial = restore.trial(written) if written is not None else result.best if result is not None else None
    assert trial is not None
    side = Side(name=found.name, where=found.run, trial=trial, machine=result.machine if result is not None else {})
    return Chosen(side=side, baseline=result.baseline if result is not None else None, config=_config(config))


def _config(text: str) -> Mapping[str, Any]:
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}
