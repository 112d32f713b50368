"""Verdicts: what is accepted, what is rejected, and the reason that is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from hasten.core.groups import conf_folder, options
from hasten.core.objective import Objective, binding, judge
from hasten.core.training_objective import TrainingObjective
from hasten.core.trial import Drop, Evaluation, Interval, Quality


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
NO_LOSS = Drop(value=0.0, bound=0.01, confidence=0.95, rows=500)


def metric(drop: Drop | None, max_drop: float | None = 0.02, higher_is_better: bool = True) -> Quality:
    return Quality(value=0.98, drop=drop, max_drop=max_drop, higher_is_better=higher_is_better)


FASTER = replace(
    BEST,
    drop=NO_LOSS,
    metrics={"accuracy": metric(NO_LOSS)},
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
    worse = replace(FASTER, metrics={"accuracy": metric(Drop(value=0.01, bound=0.024, confidence=0.996, rows=494))})
    judgement = judge(worse, BEST, Objective())
    assert (judgement.verdict, judgement.holds) == ("rejected", False)
    assert judgement.reason == (
        "accuracy may have dropped by 2.40 points (99.6% bound on 494 rows), 2.00 points allowed; observed 1.00 points"
    )


def test_refuses_when_any_metric_may_have_dropped_too_far_and_names_the_class() -> None:
    lost = Drop(value=0.1, bound=0.21, confidence=0.95, rows=40, label=3)
    judgement = judge(replace(FASTER, metrics={**FASTER.metrics, "recall": metric(lost, 0.1)}), BEST, Objective())
    assert judgement.verdict == "rejected"
    assert judgement.reason.startswith("recall of class 3 may have dropped by 21.00 points")
    assert "accuracy" not in judgement.reason


def test_tells_a_relative_rise_of_what_should_be_low() -> None:
    risen = Drop(value=0.04, bound=0.07, confidence=0.95, rows=300, relative=True, points=False)
    error = metric(risen, 0.02, higher_is_better=False)
    judgement = judge(replace(FASTER, metrics={"squared_error": error}), BEST, Objective())
    assert judgement.reason.startswith("squared_error may have risen by 7.00 % of the baseline")
    assert "2.00 % of the baseline allowed" in judgement.reason


def test_tells_a_metric_that_is_no_share_in_its_own_unit() -> None:
    drop = Drop(value=0.25, bound=1.5, confidence=0.95, rows=300, points=False)
    judgement = judge(replace(FASTER, metrics={"psnr": metric(drop, 0.5)}), BEST, Objective())
    assert "by 1.5 (95.0% bound on 300 rows), 0.5 allowed; observed 0.25" in judgement.reason


@pytest.mark.parametrize(
    "drop", [None, Drop(value=float("nan"), bound=float("nan"), confidence=0.95, rows=10)], ids=["missing", "nan"]
)
def test_a_drop_that_is_not_known_is_no_pass(drop: Drop | None) -> None:
    assert judge(replace(FASTER, metrics={"accuracy": metric(drop)}), BEST, Objective()).verdict == "rejected"


def test_says_so_where_no_metric_constrains_the_quality() -> None:
    seen = replace(FASTER, metrics={"agreement": metric(Drop(value=0.9, bound=1.0, confidence=0.95, rows=9), None)})
    for evaluation in (replace(FASTER, quality=None, drop=None, metrics={}), seen):
        judgement = judge(evaluation, BEST, Objective())
        assert (judgement.verdict, judgement.holds) == ("accepted", True)
        assert judgement.reason.endswith("; quality unchecked")
    assert "unchecked" not in judge(FASTER, BEST, Objective()).reason


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
        (Objective(min_throughput=5000), "objective.min_throughput=5000"),
        (Objective(optimize="size", max_latency_ms=0.4), "objective.max_latency_ms=0.4"),
    ],
)
def test_a_limit_that_the_best_holds_must_be_held(objective: Objective, named: str) -> None:
    best = replace(
        BEST,
        latency_ms={"p50": interval(0.3)},
        throughput=interval(9000),
        size_bytes=900_000,
        memory_bytes=90_000_000,
    )
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
    assert "latency 0.9" in str(binding(FASTER, Objective(optimize="p99", max_latency_ms=0.8)))


@pytest.mark.parametrize("ratio", [interval(1.0, 0.03), interval(0.9, 0.02)])
def test_does_not_take_noise_for_coming_closer_to_a_latency(ratio: Interval) -> None:
    objective = Objective(max_latency_ms=0.01)
    candidate = replace(FASTER, latency_ms={"p50": interval(0.99)}, speedup={"previous": ratio}, size_bytes=4_000_000)
    assert judge(candidate, BEST, objective).verdict == "rejected"


def test_more_rows_per_second_come_closer_to_a_throughput_by_the_ratio_that_was_measured_in_turns() -> None:
    objective = Objective(min_throughput=10_000)
    candidate = replace(FASTER, throughput=interval(1900))
    assert judge(candidate, BEST, objective).verdict == "accepted"
    assert judge(replace(candidate, speedup={"previous": interval(1.0, 0.1)}), BEST, objective).verdict == "rejected"
    assert binding(candidate, objective) == "throughput 1900 rows/s is 0.19x of objective.min_throughput=10000"


def changed(**figures: Any) -> Evaluation:
    """No faster than the best before, with other figures changed."""
    return replace(FASTER, speedup={"previous": interval(1.0, 0.01)}, **{"size_bytes": 4_000_000, **figures})


JUDGED = [
    # objective, candidate, verdict, start of the reason
    ("size", changed(size_bytes=1_176_000), "accepted", "3.4x smaller than the best before"),
    ("size", changed(size_bytes=3_960_000), "rejected", "less than objective.min_gain=1.02: 1.01x smaller"),
    ("size", changed(), "rejected", "not smaller: as large as the best before"),
    ("size", changed(size_bytes=5_000_000), "rejected", "larger: 1.25x larger than the best before"),
    ("memory", changed(memory_bytes=150_000_000), "accepted", "2.0x less memory than the best before"),
    ("memory", changed(memory_bytes=296_000_000), "rejected", "not measurably less memory: 1.01x less memory"),
    ("memory", changed(memory_bytes=600_000_000), "rejected", "more memory: 2.0x more memory than the best before"),
    ("throughput", FASTER, "accepted", "2.00x the rows per second of the best before [1.90, 2.10]"),
    ("throughput", changed(size_bytes=1), "rejected", "not measurably more rows per second: 1.00x"),
    ("p90", FASTER, "accepted", "2.00x the speed of the best before [1.90, 2.10]"),
]


@pytest.mark.parametrize(("optimize", "candidate", "verdict", "reason"), JUDGED, ids=[case[3] for case in JUDGED])
def test_judges_by_what_is_optimised_and_says_it_in_its_words(
    optimize: Literal["p90", "throughput", "size", "memory"], candidate: Evaluation, verdict: str, reason: str
) -> None:
    judgement = judge(candidate, BEST, Objective(optimize=optimize))
    assert judgement.verdict == verdict
    assert judgement.holds
    assert judgement.reason.startswith(reason)


def test_where_size_counts_a_slower_model_is_as_good_inside_its_latency_limit() -> None:
    small = replace(FASTER, size_bytes=1_000_000, speedup={"previous": interval(0.5, 0.1)})
    slow = replace(small, latency_ms={"p50": interval(2.0)})
    assert judge(slow, BEST, Objective(optimize="size")).verdict == "accepted"
    refused = judge(slow, BEST, Objective(optimize="size", max_latency_ms=1.5))
    assert (refused.verdict, refused.holds) == ("rejected", False)
    assert "latency 2 ms is 1.33x of objective.max_latency_ms=1.5" in refused.reason


def test_a_little_less_memory_is_noise_also_on_the_way_to_a_limit() -> None:
    objective = Objective(max_memory_mb=100)
    less = replace(FASTER, memory_bytes=297_000_000)
    assert judge(less, BEST, objective).reason.startswith("not measurably closer to the limits")
    assert judge(replace(less, memory_bytes=290_000_000), BEST, objective).verdict == "accepted"


@pytest.mark.parametrize("option", sorted(options("objective", [conf_folder()])))
def test_every_option_spells_every_knob_and_has_the_same_constraints(option: str, hydra: None) -> None:
    from hydra import compose

    node = compose(config_name="config", overrides=[f"objective={option}"]).objective
    more = TrainingObjective.__dataclass_fields__ if option == "training" else {}
    assert set(node) == {*Objective.__dataclass_fields__, *more}
    if option == "training":
        own = {name: node[name] for name in TrainingObjective.__dataclass_fields__}
        assert TrainingObjective(**own) == TrainingObjective()
        return
    objective = Objective(**node)
    assert objective.optimize == {"latency": "p50"}.get(option, option)
    assert objective.latency_percentile == "p50"
    assert replace(objective, optimize="p50") == Objective()
