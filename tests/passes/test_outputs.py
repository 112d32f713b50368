"""The distance from the teacher's outputs against its formula."""

import numpy as np
import pytest
import torch

from hasten.passes.distillation.outputs import OutputMatching
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression
from hasten.tasks.similarity import Similarity


def test_is_a_value_worked_by_hand():
    # Squared errors: with the teacher (1 + 4 + 0 + 1) / 4 = 1.5, with the targets (0 + 1 + 4 + 9) / 4 = 3.5.
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    teacher = torch.tensor([[2.0, 0.0], [3.0, 5.0]])
    targets = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    value = OutputMatching(alpha=0.25).loss(student, teacher, targets, Regression())
    assert value.item() == pytest.approx(0.75 * 3.5 + 0.25 * 1.5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_shares_its_weight_with_the_loss_of_the_task(alpha):
    student, teacher = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5]]).double(), torch.ones(2, 3).double()
    labels, task = torch.tensor([2, 0]), Classification()
    wanted = (1 - alpha) * task.loss(student, labels) + alpha * (student - 1).square().mean()
    value = OutputMatching(alpha=alpha).loss(student, teacher, labels, task)
    torch.testing.assert_close(value, wanted)


def test_alpha_one_needs_no_targets():
    embeddings = torch.ones(4, 8)
    value = OutputMatching(alpha=1.0).loss(embeddings, 3 * embeddings, torch.empty(4, 0), Similarity())
    assert value.item() == 4


@pytest.mark.parametrize("shape", [(5, 2), (5, 4, 3)])
def test_sends_its_gradient_to_the_student_alone(shape):
    draw = np.random.default_rng(0)
    student, teacher = (torch.tensor(draw.normal(size=shape), requires_grad=grad) for grad in (True, False))
    OutputMatching(alpha=1.0).loss(student, teacher, torch.empty(5, 0), Similarity()).backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / student.numel())
    assert teacher.grad is None


def test_is_for_every_task():
    assert OutputMatching.outputs is None
