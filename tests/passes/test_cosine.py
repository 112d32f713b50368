"""The cosine distance from the teacher's outputs against its formula."""

import pytest
import torch

from hasten.passes.distillation.cosine import CosineMatching
from hasten.tasks.regression import Regression
from hasten.tasks.similarity import Similarity


def test_is_a_value_worked_by_hand():
    # Angles of 90 and 45 degrees: (1 + 1 - sqrt(1/2)) / 2; squared errors with the targets (1 + 0 + 0 + 1) / 4.
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    targets = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    value = CosineMatching(alpha=0.25).loss(student, teacher, targets, Regression())
    assert value.item() == pytest.approx(0.75 * 0.5 + 0.25 * (2 - 0.5**0.5) / 2)


def test_leaves_the_length_free_and_needs_no_targets():
    embeddings = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for method in (CosineMatching(), CosineMatching(alpha=0.5)):
        value = method.loss(7 * embeddings, embeddings, torch.empty(4, 0), Similarity())
        assert value.item() == pytest.approx(0, abs=1e-6)


def test_its_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, dtype=torch.double, requires_grad=True), torch.randn(3, 4, dtype=torch.double)
    task, none = Similarity(), torch.empty(3, 0)
    assert torch.autograd.gradcheck(lambda given: CosineMatching().loss(given, teacher, none, task), student)


def test_is_for_numbers_alone():
    assert CosineMatching.outputs == "numbers"
