from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.core.errors import HastenError
from hasten.core.trial import Certificate, Drop, Quality
from hasten.evidence.bounds import paired_drop, relative_drop, score_bound
from hasten.evidence.certificate import Ledger, Reading, certify, no_better_than_chance

NUM_ROWS = 1000
LABELS = np.arange(NUM_ROWS) % 10


def scores(wrong: range) -> NDArray[np.float64]:
    right = np.ones(NUM_ROWS)
    right[wrong] = 0
    return right


def reading(
    before: NDArray[np.float64], after: NDArray[np.float64], drop: Drop, margin: float | None, better: bool = True
) -> Reading:
    points = bool(np.isin([before, after], (0, 1)).all())
    told = {"max_drop": margin, "higher_is_better": better, "points": points}
    return Reading(
        baseline=Quality(value=float(before.mean()), drop=None, **told),
        candidate=Quality(value=float(after.mean()), drop=replace(drop, points=points), **told),
    )


def accuracy(candidate: range, margin: float | None = 0.02, baseline: range = range(20)) -> Reading:
    before, after = scores(baseline), scores(candidate)
    return reading(before, after, paired_drop(before, after, 0.95), margin)


def certificate(candidate: range, margin: float | None = 0.02, reads: int = 1) -> Certificate:
    return certify({"accuracy": accuracy(candidate, margin)}, confidence=0.95, reads=reads)


def test_holds_what_the_bound_puts_inside_the_margin() -> None:
    held = certificate(range(2, 25))
    assert held.held
    assert (held.baseline, held.candidate) == pytest.approx((0.98, 0.977))
    assert held.drop == pytest.approx(0.003)
    assert held.bound == pytest.approx(score_bound(5, 2, NUM_ROWS, 0.95))
    assert held.statement == (
        "Held: with 95 % confidence on 1000 test rows the accuracy drops by no more than 2.00 points; accuracy 98.00% "
        f"before, 97.70% after, an observed drop of 0.30 points and at most {100 * held.bound:.2f} points."
    )


def test_does_not_hold_a_small_drop_that_may_be_a_large_one() -> None:
    refused = certificate(range(5, 40))
    assert refused.drop < refused.margin < refused.bound
    assert not refused.held
    assert refused.statement.startswith("Not held: with 95 % confidence")
    assert "the accuracy may drop by more than 2.00 points" in refused.statement


def test_says_how_many_rows_a_margin_would_take() -> None:
    refused = certificate(range(20), margin=0.001)
    assert not refused.held
    assert "no drop of the accuracy below 0.27 points can be certified with 95 % confidence on 1000 test rows" in (
        refused.statement
    )
    assert "so 0.10 points cannot; that takes at least 2703 rows" in refused.statement
    nothing_at_all = certificate(range(20), margin=0.0)
    assert not nothing_at_all.held
    assert "takes at least" not in nothing_at_all.statement


def test_keeping_the_quality_of_a_useless_baseline_is_no_certificate() -> None:
    labels = np.where(np.arange(NUM_ROWS) < 600, 0, 1)
    always_zero = (labels == 0).astype(float)
    nothing = no_better_than_chance(always_zero, labels, 0.95)
    assert nothing is not None
    assert nothing.startswith("Nothing to certify: the baseline is not shown to be better than always answering")
    assert "60.00% right" in nothing
    useless = reading(always_zero, always_zero, paired_drop(always_zero, always_zero, 0.95), 0.02)
    refused = certify({"accuracy": useless}, confidence=0.95, reads=1, nothing=nothing)
    assert refused.bound < refused.margin
    assert not refused.held
    assert refused.statement == f"{nothing}; {refused.statement.partition('; ')[2]}"
    assert "Held" not in refused.statement
    assert "accuracy 60.00% before, 60.00% after" in refused.statement


def test_a_baseline_that_beats_chance_has_something_to_keep() -> None:
    assert no_better_than_chance(scores(range(20)), LABELS, 0.95) is None


def test_flags_rows_that_were_read_before() -> None:
    assert "untouched" not in certificate(range(20)).statement
    again = certificate(range(20), reads=3)
    assert (again.held, again.reads) == (True, 3)
    assert "these rows have now certified 3 different artefacts and are no longer untouched" in again.statement


def likelihood(margin: float) -> Reading:
    draw = np.random.default_rng(0)
    before = draw.normal(5, 1, size=NUM_ROWS)
    after = before - draw.normal(0.1, 0.05, size=NUM_ROWS)
    return reading(before, after, paired_drop(before, after, 0.95), margin)


def test_a_metric_that_is_no_share_is_told_in_its_own_unit() -> None:
    held = certify({"log_likelihood": likelihood(0.2)}, confidence=0.95, reads=1)
    assert held.held
    assert "the log_likelihood drops by no more than 0.2;" in held.statement
    assert "points" not in held.statement
    assert not certify({"log_likelihood": likelihood(0.05)}, confidence=0.95, reads=1).held


def error(margin: float) -> Reading:
    draw = np.random.default_rng(0)
    before = draw.normal(size=NUM_ROWS) ** 2
    after = before * 1.03
    drop = replace(relative_drop(before, after, 0.95, higher_is_better=False), relative=True)
    return reading(before, after, drop, margin, better=False)


def test_an_error_grows_by_a_share_of_the_baselines() -> None:
    held = certify({"squared_error": error(0.05)}, confidence=0.95, reads=1)
    assert held.held
    assert held.drop == pytest.approx(0.03)
    assert "the squared_error grows by no more than 5.00 % of the baseline;" in held.statement
    assert "an observed growth of 3.00 % of the baseline and at most " in held.statement
    refused = certify({"squared_error": error(0.02)}, confidence=0.95, reads=1)
    assert not refused.held
    assert "the squared_error may grow by more than 2.00 % of the baseline;" in refused.statement


def test_all_of_several_metrics_have_to_hold_at_the_full_confidence() -> None:
    both = {"accuracy": accuracy(range(2, 25)), "log_likelihood": likelihood(0.2)}
    held = certify(both, confidence=0.95, reads=1)
    assert held.held
    assert held.statement.count("Held: with 95 % confidence on 1000 test rows") == 2
    alone = certify({"accuracy": both["accuracy"]}, confidence=0.95, reads=1)
    assert (held.metric, held.margin, held.bound) == (alone.metric, alone.margin, alone.bound)
    refused = certify({**both, "log_likelihood": likelihood(0.05)}, confidence=0.95, reads=1)
    assert not refused.held
    assert "Held: with 95 % confidence on 1000 test rows the accuracy drops by no more" in refused.statement
    assert "Not held: with 95 % confidence on 1000 test rows the log_likelihood may drop by more" in refused.statement
    assert {name: quality.holds for name, quality in refused.metrics.items()} == {
        "accuracy": True,
        "log_likelihood": False,
    }
    assert refused.baselines == {name: each.baseline.value for name, each in both.items()}


def test_what_is_only_measured_is_told_and_not_held() -> None:
    lost = certify(
        {"recall": accuracy(range(300), margin=None), "accuracy": accuracy(range(20))}, confidence=0.95, reads=1
    )
    assert lost.held
    assert (lost.metric, lost.candidate) == ("accuracy", pytest.approx(0.98))
    assert "the recall" not in lost.statement
    assert "recall 98.00% before, 70.00% after, an observed drop of 28.00 points" in lost.statement


def test_without_any_margin_nothing_is_held() -> None:
    unconstrained = certificate(range(20), margin=None)
    assert not unconstrained.held
    assert not unconstrained.checked
    assert unconstrained.statement.startswith("Nothing to hold: no max_drop; accuracy 98.00% before")


def test_names_the_class_that_may_have_lost_most() -> None:
    lost = accuracy(range(20), margin=0.1)
    drop = Drop(value=0.2, bound=0.31, confidence=0.95, rows=100, label=7)
    lost = replace(lost, candidate=replace(lost.candidate, value=0.7, drop=drop))
    refused = certify({"recall": lost}, confidence=0.95, reads=1)
    assert refused.statement == (
        "Not held: with 95 % confidence on 100 test rows the recall of class 7 may drop by more than 10.00 points; "
        "recall of the worst class 98.00% before, 70.00% after, an observed drop of 20.00 points and at most "
        "31.00 points in class 7."
    )


def test_a_certificate_is_plain_json_in_which_what_is_not_known_is_null() -> None:
    held = certify({"accuracy": accuracy(range(20)), "squared_error": error(0.05)}, confidence=0.95, reads=1)
    stored = json.loads(json.dumps(held.to_dict(), allow_nan=False))
    assert (stored["held"], stored["metrics"]["squared_error"]["drop"]["relative"]) == (True, True)
    unchecked = json.loads(json.dumps(Certificate.unchecked("no rows").to_dict(), allow_nan=False))
    assert (unchecked["held"], unchecked["bound"], unchecked["statement"]) == (False, None, "no rows")


def test_counts_different_artefacts_of_the_same_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "store")
    assert ledger.record("rows-a", "model-1") == 1
    assert ledger.record("rows-a", "model-1") == 1
    assert ledger.record("rows-a", "model-2") == 2
    assert ledger.record("rows-b", "model-1") == 1
    assert Ledger(tmp_path / "store").record("rows-a", "model-3") == 3
    assert len(ledger.file.read_text().splitlines()) == 4


def test_what_was_written_is_never_changed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("rows", "model-1")
    before = ledger.file.read_text()
    ledger.record("rows", "model-2")
    assert ledger.file.read_text().startswith(before)


def test_refuses_a_damaged_ledger_instead_of_forgetting(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("rows", "model-1")
    with ledger.file.open("a") as file:
        file.write('{"rows": "ro')
    with pytest.raises(HastenError, match=r"line 2 of .*certificates.jsonl is no record"):
        ledger.record("rows", "model-2")


def test_processes_that_write_at_the_same_time_lose_no_read(tmp_path: Path) -> None:
    program = "import sys; from hasten.evidence.certificate import Ledger; from pathlib import Path\n"
    program += "for i in range(10): Ledger(Path(sys.argv[1])).record('rows', f'{sys.argv[2]}-{i}')"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert Ledger(tmp_path).record("rows", "last") == 21
