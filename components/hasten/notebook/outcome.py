"""What a notebook gets: the result, and the same as tables and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hasten.core.trial import Interval, Result, TrainingResult, Trial
from hasten.reporting.terminal import Screen

if TYPE_CHECKING:
    import pandas as pd

    from hasten.artefacts.deployed import Model

_PAGE_HEIGHT = 800
"""Pixels of a report that is shown below a cell."""
_WIDTH = 100


@dataclass(frozen=True)
class Report:
    """The page of a run: `str(report)` is its path; in a notebook it is shown."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" width="100%" height="{_PAGE_HEIGHT}" style="border:0"></iframe>'


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `optimize` and `run` give back.

    Attributes:
        result: everything that `summary.json` holds: trials, certificate, warnings.
        folder: of the run, with the report and the deployed model.
    """

    result: Result | TrainingResult
    folder: Path

    @property
    def best(self) -> Trial:
        """The trial that won; the baseline where nothing was better."""
        return self.result.best

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that no other beats in what is optimised and in quality at once; the best is among them."""
        if isinstance(self.result, TrainingResult):
            return (self.result.best,)
        return tuple(trial for trial in self.result.trials if trial.number in self.result.front)

    @property
    def report(self) -> Report:
        return Report(self.folder / "report.html")

    @property
    def history(self) -> pd.DataFrame:
        """One row a trial, by its number; what was not measured is missing.

        Ratios are how many times as fast as `eager` PyTorch, as the untouched model in its best `engine` and as the
        `best` before; of a training, as the plain script and as the best before. `drop_bound` is what may have been
        lost of `quality` at most, on the validation rows.
        """
        import pandas as pd

        rows = [_row(trial) for trial in self.result.trials]
        return pd.DataFrame(rows, index=pd.Index([trial.number for trial in self.result.trials], name="trial"))

    def load(self) -> Model:
        """The deployed model: raw rows in, outputs out.

        Raises:
            HastenError: nothing was deployed, since training was what was made faster.
        """
        from hasten.artefacts.deployed import load
        from hasten.core.errors import HastenError

        if isinstance(self.result, TrainingResult):
            raise HastenError("a run that makes training faster deploys no model")
        # It was built in this process from what the user gave: native code and the user's own packages are trusted.
        return load(self.result.model_folder, trust=["native code", *_packages(Path(self.result.model_folder))])

    def __str__(self) -> str:
        text = StringIO()
        Screen(Console(file=text, width=_WIDTH, no_color=True, force_jupyter=False)).summary(self.result)
        return text.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = self.history.drop(columns=["rebuild"]).to_html(float_format=lambda value: f"{value:.4g}", na_rep="")
        return f"<pre>{escape(str(self))}</pre>{table}"


def _packages(folder: Path) -> list[str]:
    from hasten.core.files import read_json

    targets = [str(read_json(file)["arch"]["_target_"]) for file in sorted(folder.rglob("module.json"))]
    return [top for target in targets if (top := target.partition(".")[0]) != "hasten"]


def _row(trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {
        "edit": " ".join(trial.edit),
        "strategy": trial.strategy,
        "verdict": trial.verdict,
        "reason": trial.reason,
    }
    if trial.training is not None:
        row |= _interval("rows_per_second", trial.training.samples_per_second)
        row |= _ratios(trial, ("plain", "previous"))
        row["memory_bytes"] = trial.training.memory_bytes
        row["loss_holds"] = trial.training.loss.holds if trial.training.loss else None
    elif (found := trial.evaluation) is not None:
        row |= _interval("latency_ms", found.latency_ms["p50"])
        row |= _ratios(trial, ("eager", "engine", "previous"))
        row |= {"metric": found.metric, "quality": found.quality}
        row["drop_bound"] = found.drop.bound if found.drop else None
        row |= {"size_bytes": found.size_bytes, "memory_bytes": found.memory_bytes}
    return row | {"seconds": trial.seconds, "rebuild": trial.rebuild}


def _ratios(trial: Trial, names: Sequence[str]) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for name in names:
        row |= _interval(f"vs_{'best' if name == 'previous' else name}", trial.speedup.get(name))
    return row


def _interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
