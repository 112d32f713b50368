"""Verdicts: what is accepted, what is rejected, and the reason that is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.core.objective import Objective, binding, judge
from hasten.core.trial import Drop, Evaluation, Interval


def interval(value: float, half: float = 0.0) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


BEST = Evaluation(
    metric="accuracy",
    quality=0.98,
    drop=None,
    latency_ms={"p50": interval(1.0), "p90": interval(1.1), "p99": interval(1.5)},
    throughput=interval(1000),
    speedup={},
    references_ms={},
    size_bytes=4_000_000,
    memory_bytes=300_000_000,
    flops=10,
    num_parameters=10,
)
FASTER = replace(
    BEST,
    drop=Drop(value=0.0, bound=0.01, confidence=0.95, rows=500),
    latency_ms={"p50": interval(0.5), "p90": interval(0.6), "p99": interval(0.9)},
    speedup={"previous": interval(2.0, 0.1)},
    size_bytes=2_000_000,
)


def test_accepts_what_is_measurably_faster_and_holds_its_constraints() -> None:
    judgement = judge(FASTER, BEST, Objective())
    assert (judgement.verdict, judgement.holds) == ("accepted", True)
    assert "2.00x" in judgement.reason


def test_refuses_a_gain_inside_the_noise() -> None:
    judgement = judge(replace(FASTER, speedup={"previous": interval(1.05, 0.06)}), BEST, Objective())
    assert (judgement.verdict, judgement.holds) == ("rejected", True)
    assert judgement.reason.startswith("not measurably faster")


def test_refuses_what_is_slower() -> None:
    assert judge(replace(FASTER, speedup={"previous": interval(0.8, 0.1)}), BEST, Objective()).reason.startswith(
        "slower"
    )


def test_refuses_a_gain_too_small_for_a_more_complicated_recipe() -> None:
    judgement = judge(replace(FASTER, speedup={"previous": interval(1.01, 0.005)}), BEST, Objective(min_gain=1.02))
    assert judgement.verdict == "rejected"
    assert "objective.min_gain=1.02" in judgement.reason


def test_refuses_a_quality_that_may_have_dropped_too_far_however_fast() -> None:
    worse = replace(FASTER, drop=Drop(value=0.01, bound=0.024, confidence=0.996, rows=494))
    judgement = judge(worse, BEST, Objective(max_drop=0.02))
    assert (judgement.verdict, judgement.holds) == ("rejected", False)
    assert "2.40 points" in judgement.reason
    assert "494 rows" in judgement.reason


def test_refuses_a_quantized_model_that_runs_in_floats() -> None:
    judgement = judge(replace(FASTER, integer_share=0.4), BEST, Objective(), min_integer_share=0.9)
    assert judgement.verdict == "rejected"
    assert "40%" in judgement.reason


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (Objective(max_latency_ms=0.4), "objective.max_latency_ms=0.4"),
        (Objective(max_size_mb=1), "objective.max_size_mb=1"),
        (Objective(max_memory_mb=100), "objective.max_memory_mb=100"),
    ],
)
def test_a_limit_that_the_best_holds_must_be_held(objective: Objective, named: str) -> None:
    best = replace(BEST, latency_ms={"p50": interval(0.3)}, size_bytes=900_000, memory_bytes=90_000_000)
    judgement = judge(FASTER, best, objective)
    assert judgement.verdict == "rejected"
    assert named in judgement.reason


def test_comes_closer_to_a_limit_that_nothing_holds_yet() -> None:
    objective = Objective(max_size_mb=1)
    judgement = judge(FASTER, BEST, objective)
    assert (judgement.verdict, judgement.holds) == ("accepted", False)
    assert binding(FASTER, objective) == "size 2 MB is 2.00x of objective.max_size_mb=1"


def test_names_the_limit_that_is_broken_most() -> None:
    assert "max_latency_ms" in str(binding(BEST, Objective(max_latency_ms=0.1, max_size_mb=3)))
    assert binding(BEST, Objective(max_latency_ms=10, max_size_mb=30)) is None


def test_judges_by_the_percentile_that_is_asked_for() -> None:
    assert "latency 0.9" in str(binding(FASTER, Objective(minimize="p99", max_latency_ms=0.8)))


@pytest.mark.parametrize("ratio", [interval(1.0, 0.03), interval(0.9, 0.02)])
def test_does_not_take_noise_for_coming_closer_to_a_latency(ratio: Interval) -> None:
    objective = Objective(max_latency_ms=0.01)
    candidate = replace(FASTER, latency_ms={"p50": interval(0.99)}, speedup={"previous": ratio}, size_bytes=4_000_000)
    assert judge(candidate, BEST, objective).verdict == "rejected"
