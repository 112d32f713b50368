"""Metrics of every kind: how well a candidate does, and how much of it may be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.core.errors import ConfigError, EngineError, HastenError, MeasurementError
from hasten.core.sections import Metric
from hasten.evidence.bounds import paired_drop, relative_drop, score_bound, statistic_drop
from hasten.evidence.metrics import macro_f1
from hasten.evidence.quality import compared, no_better_than, quality

NUM_ROWS = 400
LABELS = np.arange(NUM_ROWS) % 4
Array = NDArray[Any]


def answers(*changed: int, to: int = 1) -> Array:
    """One-hot outputs that are right but for some rows, whose answer is `to` classes further."""
    chosen = LABELS.copy()
    chosen[list(changed)] += to
    return np.eye(4, dtype=np.float32)[chosen % 4]


def metric(name: str = "accuracy", module: str = "hasten.evidence.metrics", **settings: Any) -> Metric:
    return Metric(name=name, target=f"{module}.{name}", **settings)


ACCURACY = metric(max_drop=0.02)


def test_without_a_comparison_it_is_the_mean_of_the_rows_scores() -> None:
    found = quality(ACCURACY, answers(3, 9, 21), LABELS, LABELS)
    assert found.value == pytest.approx(397 / 400)
    assert (found.drop, found.max_drop, found.higher_is_better, found.points) == (None, 0.02, True, True)
    assert found.told() == "99.2 %"


def test_rows_that_are_right_or_wrong_are_compared_as_pairs() -> None:
    found = compared(ACCURACY, answers(0, 1, 2), answers(2, 3, 4, 5), LABELS, LABELS, 0.95)
    assert found.value == pytest.approx(396 / 400)
    assert found.drop is not None
    assert found.drop.value == pytest.approx(1 / 400)
    assert found.drop.bound == pytest.approx(score_bound(3, 2, NUM_ROWS, 0.95))
    assert (found.drop.rows, found.drop.confidence, found.drop.points, found.drop.label) == (400, 0.95, True, None)
    assert found.holds == (found.drop.bound <= 0.02)


def errors(*grown: int, by: float = 0.5) -> tuple[Array, Array]:
    """Outputs and targets of (N, 2) numbers; the outputs of some rows are further off."""
    draw = np.random.default_rng(0)
    targets = draw.normal(size=(NUM_ROWS, 2))
    outputs = targets + draw.normal(0, 0.3, size=targets.shape)
    outputs[list(grown)] = targets[list(grown)] + np.abs(outputs[list(grown)] - targets[list(grown)]) + by
    return outputs, targets


def test_of_an_error_that_grows_the_growth_is_the_drop() -> None:
    (before, targets), (after, _) = errors(), errors(*range(40))
    found = compared(metric("squared_error", higher_is_better=False), before, after, targets, None, 0.95)
    squares = [((outputs - targets) ** 2).mean(1) for outputs in (before, after)]
    expected = paired_drop(-squares[0], -squares[1], 0.95)
    assert found.value == pytest.approx(squares[1].mean())
    assert found.drop is not None
    assert found.drop.value == pytest.approx(squares[1].mean() - squares[0].mean())
    assert found.drop.value > 0
    assert found.drop.bound == pytest.approx(expected.bound)
    assert (found.points, found.drop.points, found.higher_is_better) == (False, False, False)


@pytest.mark.parametrize("better", [False, True])
def test_relative_is_a_share_of_the_baseline(better: bool) -> None:
    (before, targets), (after, _) = errors(), errors(*range(20))
    settings = {"higher_is_better": better, "relative": True, "max_drop": 0.5}
    found = compared(metric("squared_error", **settings), before, after, targets, None, 0.95)
    squares = [((outputs - targets) ** 2).mean(1) for outputs in (before, after)]
    growth = squares[1].mean() / squares[0].mean() - 1
    assert found.drop is not None
    assert found.drop.value == pytest.approx(-growth if better else growth)
    assert found.drop.bound == relative_drop(squares[0], squares[1], 0.95, higher_is_better=better).bound
    assert found.drop.relative
    assert found.drop.told(growth) == f"{100 * growth:.2f} % of the baseline"


def test_one_number_for_all_rows_is_bootstrapped_over_rows() -> None:
    before, after = answers(0, 1), answers(0, 1, *range(40, 60))
    found = compared(metric("macro_f1", max_drop=0.1), before, after, LABELS, LABELS, 0.95)
    expected = statistic_drop(macro_f1, before, after, LABELS, 0.95, higher_is_better=True, relative=False)
    assert found.value == macro_f1(after, LABELS)
    assert found.drop is not None
    assert (found.drop.value, found.drop.bound) == pytest.approx((expected.value, expected.bound))
    assert found.drop.value == pytest.approx(macro_f1(before, LABELS) - macro_f1(after, LABELS))
    assert (found.points, found.drop.rows) == (False, NUM_ROWS)


def mean_error(outputs: Array, targets: Array) -> float:
    """One number for all rows that is a mean over rows, and lower is better."""
    return float(((outputs - targets) ** 2).mean())


def test_one_number_of_which_less_is_better_drops_by_growing() -> None:
    (before, targets), (after, _) = errors(), errors(*range(40))
    settings = {"higher_is_better": False, "relative": True}
    found = compared(metric("mean_error", __name__, **settings), before, after, targets, None, 0.95)
    by_row = compared(metric("squared_error", **settings), before, after, targets, None, 0.95)
    assert found.drop is not None
    assert by_row.drop is not None
    assert found.drop.value == pytest.approx(by_row.drop.value)
    assert found.drop.bound == pytest.approx(by_row.drop.bound, rel=0.1)


RECALL = metric(by_class=True, max_drop=0.05)


def test_a_class_that_is_lost_is_named_and_not_hidden_by_the_others() -> None:
    lost = np.flatnonzero(LABELS == 2)[:20]
    whole = compared(ACCURACY, answers(0), answers(*lost), LABELS, LABELS, 0.95)
    found = compared(RECALL, answers(0), answers(*lost), LABELS, LABELS, 0.95)
    assert whole.drop is not None
    assert found.drop is not None
    assert whole.drop.value == pytest.approx(19 / 400)
    assert (found.drop.value, found.drop.label, found.drop.rows) == (pytest.approx(0.2), 2, 100)
    assert found.drop.bound == pytest.approx(score_bound(20, 0, 100, 0.95))
    assert found.value == pytest.approx(0.8), "the recall of the worst class"
    assert found.drop.subject("recall") == "recall of class 2"
    assert not found.holds


def test_the_class_that_may_have_lost_most_is_the_one_with_the_widest_bound() -> None:
    labels = np.repeat([0, 1], [380, 20])
    right = np.eye(2, dtype=np.float32)[labels]
    wrong = right.copy()
    wrong[:10] = right[:10, ::-1]
    found = compared(RECALL, right, wrong, labels, labels, 0.95)
    assert found.drop is not None
    # Of 20 rows without a loss less is known than of 380 with ten.
    assert (found.drop.label, found.drop.value, found.drop.rows) == (1, 0.0, 20)
    assert found.value == pytest.approx(370 / 380)


def distance(outputs: Array, targets: Array) -> Array:
    """A score per row of which less is better, for outputs of classes."""
    distances: Array = 1 - outputs[np.arange(len(outputs)), targets]
    return distances


def test_of_errors_the_worst_class_is_the_one_with_most() -> None:
    settings = {"by_class": True, "higher_is_better": False}
    found = quality(metric("distance", __name__, **settings), answers(*range(0, 40, 4)), LABELS, LABELS)
    assert found.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [({}, None), ({"relative": True}, LABELS)],
    ids=["without classes", "relative"],
)
def test_classes_are_only_told_apart_where_there_are_some(settings: dict[str, Any], labels: Array | None) -> None:
    by_class = metric(by_class=True, **settings)
    told = r"^task\.metrics\.accuracy\.by_class=true needs a task with classes, a function that scores each row, and"
    with pytest.raises(ConfigError, match=told):
        quality(by_class, answers(), LABELS, labels)
    with pytest.raises(ConfigError, match=told):
        compared(by_class, answers(), answers(), LABELS, labels, 0.95)


def test_one_number_for_all_rows_has_no_classes() -> None:
    with pytest.raises(ConfigError, match=r"^task\.metrics\.macro_f1\.by_class=true needs"):
        compared(metric("macro_f1", by_class=True), answers(), answers(1), LABELS, LABELS, 0.95)


def raising(outputs: Array, targets: Array) -> Array:
    raise KeyError("no such\ncolumn")


def broken(outputs: Array, targets: Array) -> Array:
    scores = np.ones(len(outputs))
    scores[:3] = np.nan, np.inf, -np.inf
    return scores


def nothing(outputs: Array, targets: Array) -> None:
    return None


def words(outputs: Array, targets: Array) -> list[str]:
    return ["good"] * len(outputs)


def square(outputs: Array, targets: Array) -> Array:
    return outputs


def few(outputs: Array, targets: Array) -> Array:
    return np.ones(3)


WRONG = [
    (raising, r"raised KeyError: 'no such\\ncolumn'$"),
    (broken, r"must give finite numbers, got 3 of 400 that are NaN or infinite$"),
    (nothing, r"must give finite numbers, got 1 of 1 that are NaN or infinite$"),
    (words, r"raised ValueError: could not convert string to float: 'good'$"),
    (square, r"must give one number, or one a row \(400,\), got \(400, 4\)$"),
    (few, r"must give one number, or one a row \(400,\), got \(3,\)$"),
]


@pytest.mark.parametrize(("function", "told"), WRONG, ids=[function.__name__ for function, _ in WRONG])
def test_a_function_that_gives_no_scores_is_told_by_its_key_in_one_line(
    function: Callable[[Array, Array], Any], told: str
) -> None:
    mine = metric(function.__name__, __name__)
    start = rf"^task\.metrics\.{mine.name}\._target_={mine.target} "
    for ask in (
        lambda: quality(mine, answers(), LABELS, LABELS),
        lambda: compared(mine, answers(), answers(), LABELS, LABELS, 0.95),
    ):
        with pytest.raises(ConfigError, match=start + told) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_function_that_is_not_there_is_told_by_its_key() -> None:
    with pytest.raises(
        ConfigError, match=r"^task\.metrics\.absent\._target_=hasten\.evidence\.metrics\.absent does not"
    ):
        quality(metric("absent"), answers(), LABELS, LABELS)


def test_outputs_that_are_no_numbers_are_the_engines_fault() -> None:
    outputs = answers()
    outputs[7, 0] = np.nan
    with pytest.raises(EngineError, match="NaN or infinite outputs for 1 of 400 rows"):
        compared(ACCURACY, answers(), outputs, LABELS, LABELS, 0.95)


def test_nothing_is_a_share_of_a_perfect_baseline() -> None:
    _, targets = errors()
    relative = metric("squared_error", higher_is_better=False, relative=True)
    with pytest.raises(MeasurementError, match="relative=false") as caught:
        compared(relative, targets, targets, targets, None, 0.95)
    assert isinstance(caught.value, HastenError)


def test_a_baseline_that_beats_a_constant_answer_is_worth_keeping() -> None:
    outputs, targets = errors()
    squared = metric("squared_error", higher_is_better=False, relative=True, max_drop=0.1)
    mean = np.repeat(targets.mean(0, keepdims=True), NUM_ROWS, 0)
    assert no_better_than(squared, mean, outputs, targets, 0.95) is None
    told = no_better_than(squared, mean, mean[::-1], targets, 0.95)
    assert told is not None
    variance = ((targets - mean) ** 2).mean()
    assert told == (
        "Nothing to certify: the baseline is not shown to be better than one answer for all rows (squared_error "
        f"{variance:.4g}, of the best constant answer {variance:.4g}, 95 % confidence)"
    )


def test_a_baseline_that_is_better_by_chance_alone_is_not() -> None:
    draw = np.random.default_rng(1)
    targets = draw.normal(size=(50, 1))
    mean = np.zeros_like(targets)
    slightly = 0.02 * targets + draw.normal(0, 0.2, targets.shape)
    assert no_better_than(metric("absolute_error", higher_is_better=False), mean, slightly, targets, 0.95) is not None


def test_a_metric_for_all_rows_can_be_held_against_a_constant_answer_too() -> None:
    constant = np.eye(4, dtype=np.float32)[np.zeros(NUM_ROWS, int)]
    f1 = metric("macro_f1", by_class=False)
    assert no_better_than(f1, constant, answers(0, 1), LABELS, 0.95) is None
    assert no_better_than(f1, constant, constant, LABELS, 0.95) is not None
