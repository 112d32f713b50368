"""A tracker that fails takes nothing with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hasten.core.interfaces import Tracker
from hasten.core.trial import Result, Trial
from hasten.tracking.guarded import Guarded
from hasten.tracking.mlflow import MlflowTracker
from hasten.tracking.none import NoTracker


class Flaky(Tracker):
    """Fails in the methods named; remembers what it was asked."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None:
        self._call("start")

    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None:
        self._call("record")

    def finish(self, result: Result | None, folder: Path, status: str) -> None:
        self._call("finish")

    def command(self) -> str | None:
        return "look"

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise OSError("http://me:hunter2@server is away,\ntwo lines")


def run_through(tracker: Tracker, trials: Sequence[Trial]) -> None:
    tracker.start("digits", "", (), Path())
    for trial in trials:
        tracker.record(trial, {}, {})
    tracker.finish(None, Path(), "FINISHED")


def test_passes_everything_on_while_all_is_well(trials: Sequence[Trial], caplog: pytest.LogCaptureFixture) -> None:
    tracker = Flaky()
    guarded = Guarded(tracker)
    run_through(guarded, trials)
    assert tracker.calls == ["start", "record", "record", "record", "record", "finish"]
    assert guarded.command() == "look"
    assert not caplog.records


def test_gives_up_where_the_start_fails(trials: Sequence[Trial], caplog: pytest.LogCaptureFixture) -> None:
    tracker = Flaky("start")
    guarded = Guarded(tracker)
    run_through(guarded, trials)
    assert tracker.calls == ["start"]
    assert guarded.command() is None
    assert len(caplog.records) == 1


def test_goes_on_after_a_lost_trial_with_one_warning(trials: Sequence[Trial], caplog: pytest.LogCaptureFixture) -> None:
    tracker = Flaky("record")
    run_through(Guarded(tracker), trials)
    assert tracker.calls == ["start", "record", "record", "record", "record", "finish"]
    [message] = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert message == "tracking lost trial 0, the run goes on without: http://***@server is away, two lines"


def test_ctrl_c_is_no_failure_of_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Flaky()
    monkeypatch.setattr(tracker, "_call", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Guarded(tracker).start("digits", "", (), Path())


def test_survives_a_place_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    guarded = Guarded(MlflowTracker(uri=f"sqlite:///{tmp_path}/file/mlflow.db", artifacts=str(tmp_path)))
    guarded.start("digits", "", (), tmp_path)
    assert guarded.command() is None
    assert len(caplog.records) == 1


def test_no_tracker_keeps_nothing(trials: Sequence[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_through(NoTracker(), trials)
    assert NoTracker().command() is None
    assert list(tmp_path.iterdir()) == []
