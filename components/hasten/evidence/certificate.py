"""The certificate: one read of the untouched test rows, written down, and a sentence that claims no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike

from hasten.core.errors import HastenError
from hasten.core.files import write_text
from hasten.core.trial import Certificate, Drop
from hasten.evidence.bounds import better_than_chance, paired_drop, rows_to_certify, smallest_certifiable


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


def certify(
    baseline_scores: ArrayLike,
    candidate_scores: ArrayLike,
    labels: ArrayLike,
    margin: float,
    confidence: float,
    metric: str,
    reads: int,
) -> Certificate:
    """Whether the candidate's drop is surely inside the margin, and the sentence that says so.

    Args:
        baseline_scores: (N,) per test row; 0/1 where the metric is a share of right rows.
        candidate_scores: (N,), the same rows in the same order.
        labels: (N,), to tell whether the baseline beats the constant answer (0/1 scores only).
        margin: largest drop of the metric that is tolerated.
        confidence: one-sided.
        reads: what `Ledger.record` said.

    Raises:
        MeasurementError: no rows, or scores that don't belong together.
    """
    drop = paired_drop(baseline_scores, candidate_scores, confidence)
    baseline, candidate = (float(np.asarray(scores).mean()) for scores in (baseline_scores, candidate_scores))
    is_share = bool(np.isin(baseline_scores, (0, 1)).all() and np.isin(candidate_scores, (0, 1)).all())
    trivial = _no_better_than_chance(baseline_scores, labels, confidence) if is_share else None
    held = trivial is None and drop.bound <= margin
    wording = _Wording(metric=metric, is_share=is_share)
    parts = [trivial or wording.verdict(drop, margin), wording.observed(baseline, candidate, drop)]
    if reads > 1:
        parts.append(f"these rows have now certified {reads} different artefacts and are no longer untouched")
    return Certificate(
        held=held,
        metric=metric,
        baseline=baseline,
        candidate=candidate,
        drop=drop.value,
        margin=margin,
        bound=drop.bound,
        confidence=confidence,
        rows=drop.rows,
        reads=reads,
        statement="; ".join(parts) + ".",
    )


def _no_better_than_chance(baseline_scores: ArrayLike, labels: ArrayLike, confidence: float) -> str | None:
    """Why keeping the baseline's quality would mean nothing; None if it means something."""
    test = better_than_chance(baseline_scores, labels, confidence)
    if test.passed:
        return None
    shown = f"{test.accuracy:.2%} right, at least {test.low:.2%} with {100 * confidence:.4g} % confidence"
    return (
        "Nothing to certify: the baseline is not shown to be better than always answering the commonest class "
        f"({shown}, against {test.majority:.2%})"
    )


@dataclass(frozen=True, kw_only=True)
class _Wording:
    """Shares are told in percentage points, other metrics in their own unit."""

    metric: str
    is_share: bool

    def verdict(self, drop: Drop, margin: float) -> str:
        sure = f"{100 * drop.confidence:.4g} % confidence on {drop.rows} test rows"
        if drop.bound <= margin:
            return f"Held: with {sure} the {self.metric} drops by no more than {self._change(margin)}"
        if self.is_share and margin < (least := smallest_certifiable(drop.rows, drop.confidence)):
            needed = f"; that takes at least {rows_to_certify(margin, drop.confidence)} rows" if margin > 0 else ""
            return (
                f"Not held: no drop below {self._change(least)} can be certified with {sure}, whatever the candidate, "
                f"so {self._change(margin)} cannot{needed}"
            )
        return f"Not held: with {sure} the {self.metric} may drop by more than {self._change(margin)}"

    def observed(self, baseline: float, candidate: float, drop: Drop) -> str:
        before, after = (f"{value:.2%}" if self.is_share else f"{value:.4g}" for value in (baseline, candidate))
        change = f"an observed drop of {self._change(drop.value)} and at most {self._change(drop.bound)}"
        return f"{self.metric} {before} before, {after} after, {change}"

    def _change(self, value: float) -> str:
        return f"{100 * value:.2f} points" if self.is_share else f"{value:.4g}"
