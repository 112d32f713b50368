"""Sweeps whose jobs take no time: `hasten run` with a pipeline that makes its result up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten import cli
from hasten.core.errors import HastenError
from hasten.core.trial import Drop, Evaluation, Interval, Quality, Trial

QUALITY = {"none": 0.98, "structured": 0.95, "unstructured": 0.97}
LATENCY_MS = {"none": 3.0, "structured": 1.0, "unstructured": 2.0}


@dataclass(frozen=True)
class Session:
    """As much of one as the pipeline asks for; nothing is composed a second time."""

    overrides: Sequence[str]
    folder: Path
    folders: Sequence[Path]

    @property
    def pruning(self) -> str:
        return next(text for text in self.overrides if text.startswith("pruning=")).removeprefix("pruning=")


def trial(number: int, session: Session, pruning: str) -> Trial:
    latency, quality = LATENCY_MS[pruning], QUALITY[pruning]
    around = Interval(value=latency, low=0.9 * latency, high=1.1 * latency)
    ratio = Interval(value=3.0 / latency, low=2.9 / latency, high=3.1 / latency)
    drop = Drop(value=0.98 - quality, bound=0.99 - quality, confidence=0.95, rows=500) if number else None
    judged = Quality(value=quality, drop=drop, max_drop=0.02, higher_is_better=True)
    return Trial(
        number=number,
        parent=0 if number else None,
        overrides=tuple(session.overrides),
        edit=(),
        strategy="given",
        bottleneck="compute",
        verdict="rejected" if quality < 0.96 else "accepted",
        reason="as it was made up",
        evaluation=Evaluation(
            metric="accuracy",
            quality=quality,
            drop=drop,
            latency_ms=dict.fromkeys(("p50", "p90", "p99"), around),
            throughput=Interval(value=1e3 / latency, low=900 / latency, high=1100 / latency),
            speedup={"eager": ratio},
            references_ms={},
            size_bytes=round(1e6 * quality),
            memory_bytes=10**8,
            flops=10**6,
            num_parameters=1000,
            metrics={"accuracy": judged},
        ),
        rebuild=f"hasten run {' '.join(session.overrides)}",
    )


class Pipeline:
    """Stands for `hasten run`.

    Attributes:
        ran: overrides of every job that it ran.
        fails: option of pruning whose jobs fail.
        interrupted: option of pruning whose jobs are interrupted.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails = self.interrupted = ""

    def __call__(self, session: Session) -> int:
        pruning = session.pruning
        self.ran.append(pruning)
        if pruning == self.interrupted:
            raise KeyboardInterrupt
        if pruning == self.fails:
            raise HastenError("nothing is left to prune")
        if "dry_run=true" in session.overrides:
            return 0
        trials = [trial(0, session, "none").to_dict(), trial(1, session, pruning).to_dict()]
        summary: dict[str, Any] = {
            "baseline": trials[0],
            "best": trials[1],
            "trials": trials,
            "stopped": "one recipe",
            "optimize": "p50",
        }
        session.folder.mkdir(parents=True, exist_ok=True)
        (session.folder / "summary.json").write_text(json.dumps(summary))
        return 0


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    monkeypatch.setattr("hasten.pipelines.run.main", fake)
    monkeypatch.setattr("hasten.pipelines.run.session", Session, raising=False)
    return fake


Sweep = Callable[..., int]


@pytest.fixture
def sweep(pipeline: Pipeline) -> Sweep:
    """`hasten -m run OVERRIDES...`."""
    return lambda *overrides: cli.run(["-m", "run", "tracking=none", *overrides])


@pytest.fixture
def found(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """`sweep.json` of the only sweep."""

    def read() -> dict[str, Any]:
        (file,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
        return json.loads(file.read_text())

    return read
