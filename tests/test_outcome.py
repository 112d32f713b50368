"""The front: trials that no other beats in what is optimised and in quality at once."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.core.recipe import Recipe
from hasten.core.trial import Evaluation, Interval, Quality, Trial
from hasten.outcome import front
from hasten.session import Candidate

RECIPE = Recipe(overrides=(), config={})


def sharp(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def candidate(
    number: int, latency_ms: float, quality: float | None, *, size: int = 1, low_is_better: bool = False
) -> Candidate:
    metrics = {}
    if quality is not None:
        metrics = {"it": Quality(value=quality, drop=None, max_drop=0.1, higher_is_better=not low_is_better)}
    evaluation = Evaluation(
        metric="it",
        quality=quality,
        drop=None,
        metrics=metrics,
        latency_ms={"p50": sharp(latency_ms), "p99": sharp(10 - latency_ms)},
        throughput=sharp(1000 / latency_ms),
        speedup={},
        references_ms={},
        size_bytes=size,
        memory_bytes=size,
        flops=1,
        num_parameters=1,
    )
    trial = Trial(
        number=number,
        parent=None,
        overrides=(),
        edit=(),
        strategy="",
        bottleneck="",
        verdict="accepted",
        reason="",
        evaluation=evaluation,
    )
    return Candidate(trial=trial, recipe=RECIPE)


def failed(number: int) -> Candidate:
    trial = Trial(
        number=number, parent=0, overrides=(), edit=(), strategy="", bottleneck="", verdict="failed", reason=""
    )
    return Candidate(trial=trial, recipe=RECIPE)


def test_holds_what_nothing_beats_in_both() -> None:
    trials = [candidate(0, 3, 0.98), candidate(1, 1, 0.95), candidate(2, 2, 0.95), failed(3), candidate(4, 0.5, 0.9)]
    assert front(trials) == (0, 1, 4)


def test_equal_trials_are_both_on_it() -> None:
    assert front([candidate(0, 1, 0.9), candidate(1, 1, 0.9)]) == (0, 1)


def test_a_lower_error_is_better() -> None:
    trials = [candidate(0, 3, 0.10, low_is_better=True), candidate(1, 1, 0.12, low_is_better=True)]
    worse = candidate(2, 2, 0.2, low_is_better=True)
    assert front([*trials, worse]) == (0, 1)


def test_only_speed_counts_where_nothing_judged_the_outputs() -> None:
    assert front([candidate(0, 3, None), candidate(1, 1, None), candidate(2, 2, None)]) == (1,)


def test_is_of_what_was_optimised() -> None:
    trials: Sequence[Candidate] = [candidate(0, 1, 0.9, size=9), candidate(1, 2, 0.9, size=3)]
    assert front(trials, "p50") == front(trials, "throughput") == (0,)
    assert front(trials, "p99") == front(trials, "size") == front(trials, "memory") == (1,)
