"""A tracker that may fail without taking the run with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hasten.core.credentials import without_credentials
from hasten.core.interfaces import Tracker
from hasten.core.trial import Result, TrainingResult, Trial

log = logging.getLogger(__name__)


class Guarded(Tracker):
    """Lets a run go on when its tracker can't: a locked database, a full disk, a server that is away.

    The first failure is one WARNING with its reason. After a failed `start` nothing more is tried, because every
    further call would wait for the same server; after a failed `record` the next ones are tried, because one trial's
    record does not need another's.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._started = False
        self._warned = False

    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None:
        self._started = self._attempt(
            "could not start", lambda: self._tracker.start(name, config_yaml, overrides, folder)
        )

    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None:
        if self._started:
            self._attempt(f"lost trial {trial.number}", lambda: self._tracker.record(trial, curves, files))

    def finish(self, result: Result | TrainingResult | None, folder: Path, status: str) -> None:
        if self._started:
            self._attempt("could not finish", lambda: self._tracker.finish(result, folder, status))

    def command(self) -> str | None:
        return self._tracker.command() if self._started else None

    def _attempt(self, failure: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            reason = without_credentials(" ".join(str(error).split()))[:500] or type(error).__name__
            level = logging.DEBUG if self._warned else logging.WARNING
            log.log(level, "tracking %s, the run goes on without: %s", failure, reason, exc_info=self._warned)
            self._warned = True
            return False
        return True
