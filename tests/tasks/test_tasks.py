"""What outputs mean: the targets that fit a task, the outputs of a row, the loss, the answer without an input."""

import numpy as np
import pytest
import torch

from hasten.core.errors import ConfigError, PassError
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression
from hasten.tasks.similarity import Similarity
from hasten.tasks.unlabelled import Unlabelled

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
LABELS = np.array([2, 0])
OUTPUTS = np.array([[0.0, 2.0], [1.0, -4.0], [0.5, 0.5]])
NUMBERS = np.array([[0.5, 0.0], [1.0, -1.0], [0.0, 0.75]])


def loss(task, outputs, targets):
    outputs = torch.tensor(outputs, requires_grad=True)
    value = task.loss(outputs, torch.tensor(targets))
    value.backward()
    assert value.shape == ()
    assert torch.isfinite(outputs.grad).all()
    return value.item()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64"])
def test_labels_of_any_whole_type_become_int64(dtype):
    given = np.array([0, 1, 1]).astype(dtype)
    targets = Classification().targets(given, 3)
    assert targets.dtype == np.int64
    assert targets.tolist() == [0, 1, 1]
    assert Classification().labels(targets) is targets


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, r"got rows without labels \(rows without labels: task=unlabelled\)$"),
        (np.eye(3, dtype=int), r"one a row, got \(3, 3\); labels in one-hot form: np\.argmax\(targets, axis=1\)$"),
        (np.zeros((2, 2, 2), int), r"one a row, got \(2, 2, 2\)$"),
        (np.array([0.0, 1.0]), r"got float64 \(numbers to predict: task=regression\)$"),
        (np.array(["cat", "dog"]), r"got <U3"),
        (np.array([3, -1, -7]), r"got 2 below 0, the least -7$"),
        (np.array([4, 4, 4]), r"^data\.targets must hold at least 2 different labels, got \[4\]$"),
    ],
)
def test_refuses_what_is_no_label(given, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        Classification().targets(given, 3)
    assert str(caught.value).startswith("data.targets must ")
    assert len(caught.value.problems) == 1


def test_a_row_has_an_output_for_every_label_up_to_the_greatest():
    assert Classification().output_shape(np.array([0, 5, 1])) == (6,)


def test_the_loss_of_classes_is_the_cross_entropy():
    log_softmax = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    assert loss(Classification(), LOGITS, LABELS) == pytest.approx(-(log_softmax[0, 2] + log_softmax[1, 0]) / 2)


def test_smoothing_spreads_its_share_over_all_classes():
    log_softmax = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    wanted = np.full((2, 3), 0.3 / 3)
    wanted[[0, 1], LABELS] += 0.7
    smoothed = loss(Classification(label_smoothing=0.3), LOGITS, LABELS)
    assert smoothed == pytest.approx(-(wanted * log_softmax).sum(1).mean())


def test_the_constant_answer_of_classes_is_the_commonest():
    outputs = Classification().constant(np.array([2, 0, 2, 1]), rows=3)
    assert (outputs.shape, outputs.argmax(1).tolist()) == ((3, 3), [2, 2, 2])


@pytest.mark.parametrize(
    ("given", "shape"),
    [(np.arange(4), (4, 1)), (np.ones((4, 2)), (4, 2)), (np.ones((4, 2, 3), np.float16), (4, 6))],
    ids=["one", "two", "steps of a series"],
)
def test_numbers_become_rows_of_float32(given, shape):
    targets = Regression().targets(given, 4)
    assert (targets.dtype, targets.shape) == (np.float32, shape)
    assert Regression().output_shape(targets) == shape[1:]
    assert Regression().labels(targets) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, r"got rows without targets \(rows without targets: task=unlabelled\)$"),
        (np.array(["1", "2", "3"]), r"got <U1$"),
        (np.array([[1.0, np.nan], [2.0, 1.0], [-np.inf, np.nan]]), r"got NaN, infinite .* in 2 of 3 rows$"),
    ],
)
def test_refuses_what_is_no_number(given, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        Regression().targets(given, 3)
    assert str(caught.value).startswith("data.targets must be finite numbers, got ")


def test_refuses_numbers_beyond_float32_without_a_word_of_numpy():
    with pytest.raises(ConfigError, match=r"too large ones in 1 of 2 rows"):
        Regression().targets(np.array([1.0, 1e300]), 2)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # differences: -0.5 2 | 0 -3 | 0.5 -0.25
        ("squared_error", (0.25 + 4 + 0 + 9 + 0.25 + 0.0625) / 6),
        ("absolute_error", (0.5 + 2 + 0 + 3 + 0.5 + 0.25) / 6),
        ("huber", (0.125 + 1.5 + 0 + 2.5 + 0.125 + 0.03125) / 6),
    ],
)
def test_the_loss_of_numbers_is_its_criterion(criterion, expected):
    assert loss(Regression(criterion=criterion), OUTPUTS, NUMBERS) == pytest.approx(expected)


def test_the_constant_answer_of_numbers_is_their_mean():
    outputs = Regression().constant(np.array([[1.0, 10.0], [3.0, 20.0]], np.float32), rows=3)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(outputs, [[2, 15]] * 3)


@pytest.mark.parametrize("task", [Similarity(), Unlabelled()])
@pytest.mark.parametrize("given", [None, np.arange(3), np.array(["a", "b", "c"])], ids=["none", "labels", "texts"])
def test_without_labels_whatever_the_file_has_is_left_aside(task, given):
    targets = task.targets(given, 3)
    assert (targets.dtype, targets.shape) == (np.float32, (3, 0))
    assert task.output_shape(targets) is None
    assert task.labels(targets) is None
    assert task.constant(targets, 3) is None
    assert task.learned_from == "baseline"


@pytest.mark.parametrize(("task", "told"), [(Similarity(), "distillation=outputs"), (Unlabelled(), "task=unlabelled")])
def test_without_labels_there_is_no_loss(task, told):
    with pytest.raises(PassError, match=told):
        task.loss(torch.zeros(2, 3), torch.zeros(2, 0))


def test_only_what_has_something_to_learn_trains():
    assert [task.trains for task in (Classification(), Regression(), Similarity(), Unlabelled())] == [
        True,
        True,
        True,
        False,
    ]
