"""What counts as a better training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.core.training_objective import TrainingObjective, binding, judge_training, worth_comparing
from hasten.core.trial import Interval, LossCurves, TrainingEvaluation

OBJECTIVE = TrainingObjective()
WITHIN = LossCurves(
    holds=True, rows=(1,), baseline=(1.0,), limit=(1.1,), candidate=(1.0,), num_seeds=(4, 2), reason="within"
)
OUTSIDE = replace(WITHIN, holds=False, candidate=(1.2,), reason="outside")


def evaluation(value: float, low: float, high: float, *, memory: int = 100, loss: LossCurves | None = WITHIN):
    ratio = Interval(value=value, low=low, high=high)
    return TrainingEvaluation(
        samples_per_second=ratio,
        step_ms=ratio,
        batch_size=8,
        speedup={"plain": ratio, "previous": ratio},
        references={},
        memory_bytes=memory * 10**6,
        start_seconds=1.0,
        loss=loss,
    )


BEST = evaluation(1.0, 1.0, 1.0)


def test_accepts_what_is_surely_faster_and_learns_as_well() -> None:
    found = judge_training(evaluation(1.5, 1.4, 1.6), BEST, OBJECTIVE)
    assert (found.verdict, found.holds) == ("accepted", True)
    assert found.reason == "1.50x the rows per second of the best before [1.40, 1.60]; loss within"


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [
        ((0.8, 0.7, 0.9), "fewer rows per second"),
        ((1.1, 0.95, 1.2), "not measurably more rows per second"),
        ((1.01, 1.005, 1.015), "less than objective.min_gain=1.02"),
    ],
)
def test_rejects_what_is_no_faster(ratio: tuple[float, float, float], reason: str) -> None:
    found = judge_training(evaluation(*ratio, loss=None), BEST, OBJECTIVE)
    assert found.verdict == "rejected"
    assert found.reason.startswith(reason)
    assert not worth_comparing(evaluation(*ratio, loss=None), 0, OBJECTIVE)


def test_rejects_what_is_faster_and_learns_less() -> None:
    found = judge_training(evaluation(2.0, 1.9, 2.1, loss=OUTSIDE), BEST, OBJECTIVE)
    assert found.verdict == "rejected"
    assert found.reason.startswith("faster, but it does not learn as well: outside")


def test_an_uncompared_loss_is_never_accepted() -> None:
    found = judge_training(evaluation(2.0, 1.9, 2.1, loss=None), BEST, OBJECTIVE)
    assert found.verdict == "rejected"
    assert "not compared" in found.reason
    assert worth_comparing(evaluation(2.0, 1.9, 2.1, loss=None), 0, OBJECTIVE)


def test_memory_beyond_its_limit_rejects_however_fast_it_is() -> None:
    limited = replace(OBJECTIVE, max_memory_mb=150.0)
    fast = evaluation(3.0, 2.9, 3.1, memory=200)
    found = judge_training(fast, BEST, limited)
    assert found.verdict == "rejected"
    assert found.reason == "memory 200 MB of objective.max_memory_mb=150" == binding(fast, limited)
    assert not worth_comparing(fast, BEST.memory_bytes, limited)
    assert binding(BEST, limited) is None


def test_what_comes_closer_to_a_broken_limit_may_be_slower() -> None:
    limited = replace(OBJECTIVE, max_memory_mb=50.0)
    smaller = evaluation(0.9, 0.8, 0.95, memory=60)
    assert worth_comparing(smaller, BEST.memory_bytes, limited)
    found = judge_training(smaller, BEST, limited)
    assert (found.verdict, found.holds) == ("accepted", False)
    assert found.reason.startswith("closer to the limit, memory 60 MB of objective.max_memory_mb=50; ")
