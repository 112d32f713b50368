"""The certificate: one read of the untouched test rows, written down, and a sentence that claims no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from numpy.typing import ArrayLike

from hasten.core.errors import HastenError
from hasten.core.files import write_text
from hasten.core.trial import Certificate, Drop, Quality
from hasten.evidence.bounds import better_than_chance, rows_to_certify, smallest_certifiable


@dataclass(frozen=True)
class Ledger:
    """Which artefacts have been certified on which test rows: `certificates.jsonl` in a folder, only ever added to.

    It belongs where all runs that may use the same rows find it, beside the store rather than in a run's own folder.
    """

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "certificates.jsonl"

    def record(self, test_fingerprint: str, artefact_key: str) -> int:
        """Writes down that an artefact is certified on these rows; call it before the rows are read.

        Returns:
            How many different artefacts have been certified on them by now, this one included. The same artefact again
            learns nothing new from the rows and is no new read.

        Raises:
            HastenError: the ledger can't be read as one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "certificates.lock"):
            text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
            known = {entry["artefact"] for entry in self._entries(text) if entry["rows"] == test_fingerprint}
            if artefact_key not in known:
                when = datetime.now(UTC).isoformat(timespec="seconds")
                entry = {"rows": test_fingerprint, "artefact": artefact_key, "when": when}
                write_text(self.file, text + json.dumps(entry) + "\n")
        return len(known | {artefact_key})

    def _entries(self, text: str) -> list[dict[str, Any]]:
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entry = json.loads(line)
                entries.append({"rows": entry["rows"], "artefact": entry["artefact"]})
            except (ValueError, KeyError, TypeError):
                raise HastenError(
                    f"line {number} of {self.file} is no record of a certificate: repair it or move the file away, "
                    "and earlier reads of the test rows are no longer known"
                ) from None
        return entries


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One metric on the test rows: of the baseline, and of the candidate with what it may have lost."""

    baseline: Quality
    candidate: Quality

    @property
    def drop(self) -> Drop:
        assert self.candidate.drop is not None
        return self.candidate.drop


def certify(
    readings: Mapping[str, Reading], *, confidence: float, reads: int, nothing: str | None = None
) -> Certificate:
    """Whether the candidate's drops are all surely inside what is tolerated, and the sentences that say so.

    That each of several drops is inside its margin is an intersection-union test: each is asked at the full confidence
    (Berger 1982), and all have to hold.

    Args:
        readings: metric -> what it says; the first decides what is told first.
        confidence: one-sided.
        reads: what `Ledger.record` said.
        nothing: why there is nothing to certify (no labels, or a baseline that knows nothing); None where there is.
    """
    constrained = {name: reading for name, reading in readings.items() if reading.candidate.max_drop is not None}
    held = nothing is None and bool(constrained) and all(reading.candidate.holds for reading in constrained.values())
    (first, leading), *_ = [*constrained.items(), *readings.items()]
    verdicts = [_verdict(name, reading) for name, reading in constrained.items()] or ["Nothing to hold: no max_drop"]
    parts = [nothing] if nothing else verdicts
    parts += [_observed(name, reading) for name, reading in readings.items()]
    if reads > 1:
        parts.append(f"these rows have now certified {reads} different artefacts and are no longer untouched")
    return Certificate(
        held=held,
        metric=first,
        baseline=leading.baseline.value,
        candidate=leading.candidate.value,
        drop=leading.drop.value,
        margin=leading.candidate.max_drop or 0.0,
        bound=leading.drop.bound,
        confidence=confidence,
        rows=leading.drop.rows,
        reads=reads,
        statement="; ".join(parts) + ".",
        metrics={name: reading.candidate for name, reading in readings.items()},
        baselines={name: reading.baseline.value for name, reading in readings.items()},
    )


def no_better_than_chance(correct: ArrayLike, labels: ArrayLike, confidence: float) -> str | None:
    """Why keeping the baseline's accuracy would mean nothing; None if it means something."""
    test = better_than_chance(correct, labels, confidence)
    if test.passed:
        return None
    shown = f"{test.accuracy:.2%} right, at least {test.low:.2%} with {100 * confidence:.4g} % confidence"
    return (
        "Nothing to certify: the baseline is not shown to be better than always answering the commonest class "
        f"({shown}, against {test.majority:.2%})"
    )


def _verdict(name: str, reading: Reading) -> str:
    drop, margin = reading.drop, reading.candidate.max_drop
    assert margin is not None
    sure = f"{100 * drop.confidence:.4g} % confidence on {drop.rows} test rows"
    what = drop.subject(name)
    verb = "drops" if reading.candidate.higher_is_better else "grows"
    if drop.bound <= margin:
        return f"Held: with {sure} the {what} {verb} by no more than {drop.told(margin)}"
    if drop.points and not drop.relative and margin < (least := smallest_certifiable(drop.rows, drop.confidence)):
        needed = f"; that takes at least {rows_to_certify(margin, drop.confidence)} rows" if margin > 0 else ""
        return (
            f"Not held: no drop of the {what} below {drop.told(least)} can be certified with {sure}, whatever the "
            f"candidate, so {drop.told(margin)} cannot{needed}"
        )
    return f"Not held: with {sure} the {what} may {verb.removesuffix('s')} by more than {drop.told(margin)}"


def _observed(name: str, reading: Reading) -> str:
    drop = reading.drop
    before, after = (
        f"{value:.2%}" if drop.points else f"{value:.4g}" for value in (reading.baseline.value, reading.candidate.value)
    )
    loss = "drop" if reading.candidate.higher_is_better else "growth"
    of_all = "" if drop.label is None else " of the worst class"
    worst = "" if drop.label is None else f" in class {drop.label}"
    change = f"an observed {loss} of {drop.told(drop.value)} and at most {drop.told(drop.bound)}{worst}"
    return f"{name}{of_all} {before} before, {after} after, {change}"
