"""The distillation loss against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.passes.distillation.soft_labels import SoftLabels
from hasten.tasks.classification import Classification

STUDENT = np.array([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
TEACHER = np.array([[1.0, 0.0, 3.0], [-1.0, 4.0, 0.5]])
LABELS = np.array([2, 1])
TASK = Classification()


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def by_hand(student, alpha, temperature):
    hard = -log_softmax(student)[np.arange(len(LABELS)), LABELS]
    soft = -(np.exp(log_softmax(TEACHER / temperature)) * log_softmax(student / temperature)).sum(1)
    return ((1 - alpha) * hard + alpha * temperature**2 * soft).mean()


def loss(student, alpha, temperature):
    method = SoftLabels(alpha=alpha, temperature=temperature)
    return method.loss(torch.as_tensor(student), torch.tensor(TEACHER), torch.tensor(LABELS), TASK)


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_is_the_formula(alpha, temperature):
    assert loss(STUDENT, alpha, temperature).item() == pytest.approx(by_hand(STUDENT, alpha, temperature), rel=1e-9)


def test_is_a_value_worked_by_hand():
    # One row, two classes, T = 2: s(teacher / 2) = (3/4, 1/4), s(student / 2) = (1/2, 1/2), s(student) = (1/2, 1/2).
    teacher = torch.tensor([[2 * np.log(3.0), 0.0]])
    value = SoftLabels(alpha=0.25, temperature=2.0).loss(torch.zeros(1, 2), teacher, torch.tensor([0]), TASK)
    assert value.item() == pytest.approx(0.75 * np.log(2) + 0.25 * 4 * np.log(2))


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_alpha_zero_is_cross_entropy_with_the_labels(temperature):
    wanted = -log_softmax(STUDENT)[[0, 1], LABELS].mean()
    assert loss(STUDENT, 0.0, temperature).item() == pytest.approx(wanted)


def test_alpha_one_ignores_the_labels():
    method = SoftLabels(alpha=1.0, temperature=3.0)
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    one, other = (method.loss(student, teacher, torch.tensor(labels), TASK) for labels in ([0, 0], [1, 2]))
    assert one == other


def test_alpha_one_is_least_where_the_student_agrees_with_the_teacher():
    agreeing = torch.tensor(TEACHER, requires_grad=True)
    value = SoftLabels(alpha=1.0, temperature=2.0).loss(agreeing, torch.tensor(TEACHER), torch.tensor(LABELS), TASK)
    value.backward()
    assert abs(agreeing.grad).max() < 1e-12


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.3, 0.7), (1.0, 1.0)])
def test_its_gradient_is_the_finite_difference(alpha, temperature):
    student = torch.tensor(STUDENT, requires_grad=True)
    loss(student, alpha, temperature).backward()
    for place in np.ndindex(STUDENT.shape):
        step = np.zeros_like(STUDENT)
        step[place] = 1e-5
        difference = by_hand(STUDENT + step, alpha, temperature) - by_hand(STUDENT - step, alpha, temperature)
        assert student.grad[place].item() == pytest.approx(difference / 2e-5, rel=1e-5, abs=1e-8)


def test_sends_no_gradient_to_the_teacher():
    teacher = torch.tensor(TEACHER)
    student = torch.tensor(STUDENT, requires_grad=True)
    SoftLabels().loss(student, teacher, torch.tensor(LABELS), TASK).backward()
    assert teacher.grad is None


def test_is_for_classes_alone():
    assert SoftLabels.outputs == "classes"


def test_takes_the_loss_of_the_task():
    method, smoothed = SoftLabels(alpha=0.0), Classification(label_smoothing=0.2)
    student, labels = torch.tensor(STUDENT), torch.tensor(LABELS)
    assert method.loss(student, torch.tensor(TEACHER), labels, smoothed) == smoothed.loss(student, labels)
