"""The summary of a sweep, from what its jobs have left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hasten.core.credentials import without_credentials
from hasten.core.trial import Trial
from hasten.reporting import sweep as reported
from hasten.reporting.facts import restored
from hasten.sweeping.job import Outcome


def summarised(
    outcomes: Sequence[Outcome],
    *,
    name: str,
    experiment: str,
    command: str,
    folder: Path,
    total: int | None,
    notes: Sequence[str] = (),
) -> reported.Sweep:
    """All jobs that have come to their end, with the numbers under which they were told.

    Args:
        folder: of the sweep.
    """
    jobs = tuple(_job(outcome.number + 1, outcome, folder) for outcome in outcomes)
    summaries = [outcome.summary for outcome in outcomes if outcome.trial is not None and outcome.summary is not None]
    baselines = [restored(Trial, summary["baseline"]) for summary in summaries]
    return reported.Sweep(
        name=name,
        experiment=experiment,
        command=command,
        optimize=str(summaries[0].get("optimize", "p50")) if summaries else "p50",
        jobs=jobs,
        total=total,
        untouched=baselines[0] if baselines else None,
        one_baseline=len({tuple(sorted(baseline.stages.items())) for baseline in baselines}) <= 1,
        notes=tuple(notes),
    )


def _job(number: int, outcome: Outcome, folder: Path) -> reported.Job:
    trial = replace(restored(Trial, outcome.trial), number=number) if outcome.trial is not None else None
    verdict = "failed" if outcome.failed else outcome.verdict
    return reported.Job(
        number=number,
        choices=dict(_choice(override) for override in outcome.job.varied),
        folder=os.path.relpath(outcome.folder, folder),
        verdict=verdict,
        reason=without_credentials(outcome.reason),
        seconds=outcome.seconds,
        trial=trial,
        rebuild=without_credentials(trial.rebuild) if trial is not None else "",
    )


def _choice(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+").partition("=")
    return key, without_credentials(value)
