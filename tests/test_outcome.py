"""The front: trials that no other beats in what is optimised and in quality at once."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.core.trial import Evaluation, Interval, Quality, Trial
from hasten.outcome import front


def sharp(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def trial(
    number: int, latency_ms: float, quality: float | None, *, size: int = 1, low_is_better: bool = False
) -> Trial:
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
    return Trial(
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


def failed(number: int) -> Trial:
    return Trial(
        number=number, parent=0, overrides=(), edit=(), strategy="", bottleneck="", verdict="failed", reason=""
    )


def test_holds_what_nothing_beats_in_both() -> None:
    trials = [trial(0, 3, 0.98), trial(1, 1, 0.95), trial(2, 2, 0.95), failed(3), trial(4, 0.5, 0.9)]
    assert front(trials, best=1) == (0, 1, 4)


def test_equal_trials_are_both_on_it() -> None:
    assert front([trial(0, 1, 0.9), trial(1, 1, 0.9)], best=0) == (0, 1)


def test_a_lower_error_is_better() -> None:
    trials = [trial(0, 3, 0.10, low_is_better=True), trial(1, 1, 0.12, low_is_better=True)]
    worse = trial(2, 2, 0.2, low_is_better=True)
    assert front([*trials, worse], best=1) == (0, 1)


def test_only_speed_counts_where_nothing_judged_the_outputs() -> None:
    assert front([trial(0, 3, None), trial(1, 1, None), trial(2, 2, None)], best=1) == (1,)


def test_is_of_what_was_optimised() -> None:
    trials: Sequence[Trial] = [trial(0, 1, 0.9, size=9), trial(1, 2, 0.9, size=3)]
    assert front(trials, "p50", best=0) == front(trials, "throughput", best=0) == (0,)
    assert all(front(trials, optimize, best=1) == (1,) for optimize in ("p99", "size", "memory"))


def test_the_best_is_on_it_whatever_could_not_be_shown_to_be_better() -> None:
    trials = [trial(0, 3, 0.9), trial(1, 1, 0.9), trial(2, 0.99, 0.9), trial(3, 2, 0.9)]
    assert front(trials, best=1) == (1, 2)
