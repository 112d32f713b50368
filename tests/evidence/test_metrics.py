from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score

from hasten.core.errors import EngineError
from hasten.evidence.metrics import (
    absolute_error,
    accuracy,
    agreement,
    cosine_similarity,
    cross_entropy,
    macro_f1,
    spearman,
    squared_error,
)

Metric = Callable[[NDArray[Any], NDArray[Any]], Any]

OUTPUTS = np.array([[0.1, 0.9, 0.0], [2.0, -1.0, 1.0], [-3.0, -2.0, -1.0]], dtype=np.float32)
LABELS = np.array([1, 2, 2])
OF_CLASSES: list[Metric] = [accuracy, macro_f1, cross_entropy]
LIKE_TARGETS: list[Metric] = [squared_error, absolute_error, cosine_similarity, agreement]


def test_a_row_scores_where_its_largest_output_is_the_labels() -> None:
    scores = accuracy(OUTPUTS, LABELS)
    assert scores.tolist() == [1.0, 0.0, 1.0]
    assert scores.dtype == np.float64


@pytest.mark.parametrize("metric", [*OF_CLASSES, *LIKE_TARGETS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_outputs_that_are_not_finite(metric: Metric, value: float) -> None:
    outputs = OUTPUTS.copy()
    outputs[1, 2] = value
    with pytest.raises(EngineError, match="NaN or infinite outputs for 1 of 3 rows"):
        metric(outputs, LABELS if metric in OF_CLASSES else OUTPUTS)


@pytest.mark.parametrize("metric", OF_CLASSES)
def test_classes_need_a_row_of_outputs_a_label(metric: Metric) -> None:
    with pytest.raises(EngineError, match=r"shape \(2, classes\).*got \(3, 3\)"):
        metric(OUTPUTS, LABELS[:2])
    with pytest.raises(EngineError, match=r"got \(3,\)"):
        metric(OUTPUTS[:, 0], LABELS)


@pytest.mark.parametrize("metric", LIKE_TARGETS)
def test_outputs_need_the_shape_of_the_targets(metric: Metric) -> None:
    with pytest.raises(EngineError, match=r"shape of the targets \(3, 1\), got \(3, 3\)"):
        metric(OUTPUTS, OUTPUTS[:, :1])


def test_macro_f1_by_hand() -> None:
    # Class 0: taken once, never right. Class 1: taken and right once. Class 2: two rows, one of them right.
    assert macro_f1(OUTPUTS, LABELS) == pytest.approx((0 + 1 + 2 / 3) / 3)


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**32))
def test_macro_f1_is_scikit_learns(classes: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs, labels = rng.normal(size=(rows, classes)), rng.integers(classes, size=rows)
    expected = f1_score(labels, outputs.argmax(axis=1), average="macro")
    assert macro_f1(outputs, labels) == pytest.approx(expected)


def test_macro_f1_counts_a_class_that_has_no_output() -> None:
    assert macro_f1(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 2])) == pytest.approx((2 / 3 + 0) / 2)


def test_macro_f1_of_no_rows_is_refused() -> None:
    with pytest.raises(EngineError, match="at least 1 row"):
        macro_f1(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def test_cross_entropy_is_minus_the_logarithm_of_the_labels_share() -> None:
    outputs = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    np.testing.assert_allclose(cross_entropy(outputs + 7, np.array([0, 1])), -np.log([0.25, 0.5]))


def test_cross_entropy_neither_over_nor_underflows() -> None:
    scores = cross_entropy(np.array([[1e30, 0.0], [-2000.0, 0.0]], dtype=np.float32), np.array([0, 0]))
    assert scores.tolist() == [0.0, 2000.0]


def test_cross_entropy_needs_an_output_for_each_label() -> None:
    with pytest.raises(EngineError, match="3 outputs a row tell labels 0 to 2, but the labels go from 1 to 3"):
        cross_entropy(OUTPUTS, np.array([1, 2, 3]))


def test_errors_are_means_over_the_outputs_of_a_row() -> None:
    outputs, targets = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 4.0], [3.0, -3.0]])
    assert squared_error(outputs, targets).tolist() == [2.5, 9.0]
    assert absolute_error(outputs, targets).tolist() == [1.5, 3.0]
    assert squared_error(outputs[:, 0], targets[:, 0]).tolist() == [1.0, 9.0]
    assert squared_error(outputs[:, :, None], targets[:, :, None]).tolist() == [2.5, 9.0]


def test_errors_of_float32_outputs_are_reckoned_in_double_precision() -> None:
    assert absolute_error(np.array([[1e8]], dtype=np.float32), np.array([[1.0]])).tolist() == [1e8 - 1]


def test_cosine_by_hand() -> None:
    outputs = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    targets = np.array([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine_similarity(outputs, targets), [0, np.sqrt(0.5), -1, 0, 1], atol=1e-15)


@settings(max_examples=50)
@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.floats(1e-5, 1e5))
def test_a_cosine_does_not_know_lengths(rows: NDArray[np.float32], factor: float) -> None:
    scores = cosine_similarity(rows, rows * np.float64(factor))
    np.testing.assert_allclose(scores, 1.0)
    assert (scores <= 1).all()


def test_agreement_is_about_the_place_of_the_largest() -> None:
    assert agreement(OUTPUTS, OUTPUTS[[0, 2, 2]]).tolist() == [1.0, 0.0, 1.0]
    assert agreement(OUTPUTS[:, :, None], 5 * OUTPUTS[:, :, None] + 1).tolist() == [1.0] * 3
    assert agreement(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])).tolist() == [0.0]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    outputs, targets = np.array(pairs, dtype=np.float64).T
    if len(set(outputs)) > 1 and len(set(targets)) > 1:
        expected = stats.spearmanr(outputs, targets).statistic
        assert spearman(outputs, targets) == pytest.approx(expected)
        assert spearman(outputs[:, None], targets[:, None]) == pytest.approx(expected)


def test_spearman_knows_only_the_order() -> None:
    values = np.array([-5.0, 0.1, 0.2, 7.0])
    assert spearman(np.exp(values), values) == pytest.approx(1)
    assert spearman(-values, values) == pytest.approx(-1)


def test_outputs_without_an_order_score_nothing_and_targets_without_one_are_refused() -> None:
    assert spearman(np.ones(4), np.arange(4)) == 0
    with pytest.raises(EngineError, match="spearman needs targets that differ, got 4 equal ones"):
        spearman(np.arange(4.0), np.ones(4))


def test_spearman_needs_one_finite_output_a_row() -> None:
    with pytest.raises(EngineError, match=r"outputs \(3, 3\) and targets \(3,\)"):
        spearman(OUTPUTS, LABELS)
    with pytest.raises(EngineError, match=r"outputs \(3,\) and targets \(2,\)"):
        spearman(OUTPUTS[:, 0], LABELS[:2])
    with pytest.raises(EngineError, match="infinite outputs for 1 of 3 rows"):
        spearman(np.array([0.0, np.nan, 1.0]), LABELS)
