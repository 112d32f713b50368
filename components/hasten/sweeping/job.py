"""One job of a sweep: what is asked for, where it lies, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hasten.core.files import digest, read_json

JOB_FILE = "job.json"
"""In the folder of a finished job: what it was, its exit code, verdict and reason, and how long it took."""
SUMMARY_FILE = "summary.json"

IGNORED_SECTIONS = ("tracking", "callbacks", "sweep")
"""Sections that change nothing of what a job gives: with other values of theirs it is the same job."""

NAME_CHARACTERS = 60
HASH_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command line.

    Attributes:
        overrides: all of it, as Hydra takes it.
        varied: those of them that tell it from the other jobs of its sweep.
    """

    overrides: tuple[str, ...]
    varied: tuple[str, ...]

    @property
    def told(self) -> str:
        return " ".join(self.varied) or " ".join(self.overrides)

    def name(self, config_dir: Path | None) -> str:
        """Of its folder: its choices in short, and a hash of all that decides what it gives."""
        choices = (override.lstrip("+~").partition("=") for override in self.varied)
        words = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, _, value in choices)
        return f"{slug(words or 'job')}-{identity(self.overrides, config_dir)}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        folder: where it left its results.
        code: exit code that it would have had as a command of its own.
        verdict: of the recipe: accepted, rejected or failed; of a pipeline that judges nothing: done or failed.
        reason: of the verdict.
        seconds: that it took.
        fresh: whether this call has run it; False for what was there before.
        number: of the job in its sweep, from 0.
    """

    job: Job
    folder: Path
    code: int
    verdict: str
    reason: str
    seconds: float
    fresh: bool = False
    number: int = 0

    @property
    def failed(self) -> bool:
        return self.code != 0 or self.verdict == "failed"

    @cached_property
    def summary(self) -> Mapping[str, Any] | None:
        """`summary.json` of the job; None where it left none."""
        file = self.folder / SUMMARY_FILE
        return read_json(file) if file.is_file() else None

    @property
    def trial(self) -> Mapping[str, Any] | None:
        """What stands for the job: the recipe that it declared, or the best that it found; None where it failed."""
        if self.summary is None or self.failed:
            return None
        trial = deciding_trial(self.summary)
        measured = trial.get("evaluation") or trial.get("training")
        return trial if measured else None


def deciding_trial(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of `hasten run` the recipe's own, of a search the best."""
    trial: Mapping[str, Any] = summary["trials"][-1] if summary["stopped"] == "one recipe" else summary["best"]
    return trial


def finished(folder: Path, config_digest: str) -> Mapping[str, Any] | None:
    """What a job of that config left in the folder; None where it has not come to its end."""
    try:
        found: dict[str, Any] = read_json(folder / JOB_FILE)
    except (OSError, ValueError):
        return None
    return found if found.get("config") == config_digest else None


def identity(overrides: Iterable[str], config_dir: Path | None) -> str:
    """Hash of a command line, whatever its order; equal for those that give the same."""
    decide = sorted(text for text in overrides if section(text) not in IGNORED_SECTIONS)
    return digest([decide, str(config_dir.absolute()) if config_dir else None])[:HASH_CHARACTERS]


def section(override: str) -> str:
    """Group or section that an override belongs to."""
    return re.split(r"[.=@]", override.lstrip("+~"), maxsplit=1)[0]


def slug(text: str) -> str:
    """What a folder may be called."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")[:NAME_CHARACTERS].rstrip("-._")


def told_counts(outcomes: Sequence[Outcome]) -> str:
    """`3 accepted, 1 failed`."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        verdict = "failed" if outcome.failed else outcome.verdict
        counts[verdict] = counts.get(verdict, 0) + 1
    order = ("accepted", "rejected", "done", "failed")
    return ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
