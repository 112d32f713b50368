from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.core.errors import HastenError
from hasten.core.trial import Certificate
from hasten.evidence.bounds import score_bound
from hasten.evidence.certificate import Ledger, certify

NUM_ROWS = 1000
LABELS = np.arange(NUM_ROWS) % 10


def scores(wrong: range) -> NDArray[np.float64]:
    right = np.ones(NUM_ROWS)
    right[wrong] = 0
    return right


def certificate(candidate: NDArray[np.float64], margin: float = 0.02, reads: int = 1) -> Certificate:
    return certify(scores(range(20)), candidate, LABELS, margin, 0.95, "accuracy", reads)


def test_holds_what_the_bound_puts_inside_the_margin() -> None:
    held = certificate(scores(range(2, 25)))
    assert held.held
    assert (held.baseline, held.candidate) == pytest.approx((0.98, 0.977))
    assert held.drop == pytest.approx(0.003)
    assert held.bound == pytest.approx(score_bound(5, 2, NUM_ROWS, 0.95))
    assert held.statement == (
        "Held: with 95 % confidence on 1000 test rows the accuracy drops by no more than 2.00 points; accuracy 98.00% "
        f"before, 97.70% after, an observed drop of 0.30 points and at most {100 * held.bound:.2f} points."
    )


def test_does_not_hold_a_small_drop_that_may_be_a_large_one() -> None:
    refused = certificate(scores(range(5, 40)))
    assert refused.drop < refused.margin < refused.bound
    assert not refused.held
    assert refused.statement.startswith("Not held: with 95 % confidence")
    assert "may drop by more than 2.00 points" in refused.statement


def test_says_how_many_rows_a_margin_would_take() -> None:
    refused = certificate(scores(range(20)), margin=0.001)
    assert not refused.held
    assert "no drop below 0.27 points can be certified with 95 % confidence on 1000 test rows" in refused.statement
    assert "at least 2703 rows" in refused.statement
    nothing_at_all = certificate(scores(range(20)), margin=0.0)
    assert not nothing_at_all.held
    assert "takes at least" not in nothing_at_all.statement


def test_keeping_the_quality_of_a_useless_baseline_is_no_certificate() -> None:
    labels = np.where(np.arange(NUM_ROWS) < 600, 0, 1)
    always_zero = (labels == 0).astype(float)
    useless = certify(always_zero, always_zero, labels, 0.02, 0.95, "accuracy", 1)
    assert useless.bound < useless.margin
    assert not useless.held
    assert useless.statement.startswith(
        "Nothing to certify: the baseline is not shown to be better than always answering"
    )
    assert "60.00% right" in useless.statement


def test_flags_rows_that_were_read_before() -> None:
    assert "untouched" not in certificate(scores(range(20))).statement
    again = certificate(scores(range(20)), reads=3)
    assert (again.held, again.reads) == (True, 3)
    assert "these rows have now certified 3 different artefacts and are no longer untouched" in again.statement


def test_a_metric_that_is_no_share_is_told_in_its_own_unit() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.normal(5, 1, size=NUM_ROWS)
    candidate = baseline - rng.normal(0.1, 0.05, size=NUM_ROWS)
    held = certify(baseline, candidate, LABELS, 0.2, 0.95, "log_likelihood", 1)
    assert held.held
    assert "the log_likelihood drops by no more than 0.2;" in held.statement
    assert "points" not in held.statement
    assert not certify(baseline, candidate, LABELS, 0.05, 0.95, "log_likelihood", 1).held


def test_a_certificate_survives_json() -> None:
    held = certificate(scores(range(20)))
    assert Certificate(**json.loads(json.dumps(held.to_dict()))) == held


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
