"""No record beyond the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.core.interfaces import Tracker
from hasten.core.trial import Result, TrainingResult, Trial


@dataclass(frozen=True, kw_only=True)
class NoTracker(Tracker):
    """Keeps nothing: `summary.json` and `report.html` in the output folder say it all."""

    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None: ...

    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None: ...

    def finish(self, result: Result | TrainingResult | None, folder: Path, status: str) -> None: ...

    def command(self) -> str | None:
        return None
