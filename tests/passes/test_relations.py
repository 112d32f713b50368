"""Relations between rows against another implementation, and what they do not mind."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from hasten.core.errors import ConfigError
from hasten.passes.distillation.relations import RelationalKnowledge
from hasten.passes.distillation.soft_labels import SoftLabels
from hasten.tasks.classification import Classification
from hasten.tasks.similarity import Similarity

DRAW = np.random.default_rng(0)
STUDENT, TEACHER = DRAW.normal(size=(6, 2)), DRAW.normal(size=(6, 5))


def relations(student, teacher, distance=1.0, angle=1.0):
    method = RelationalKnowledge(
        student_layers=("a",), teacher_layers=("b",), distance_weight=distance, angle_weight=angle
    )
    return method.layer_loss([torch.as_tensor(student)], [torch.as_tensor(teacher)], [])


def huber(difference):
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def distances(rows):
    pairs = {(i, j): math.dist(rows[i], rows[j]) for i, j in permutations(range(len(rows)), 2)}
    mean = sum(pairs.values()) / len(pairs)
    return {pair: value / mean for pair, value in pairs.items()}


def cosines(rows):
    def cosine(i, j, k):
        one, other = rows[i] - rows[j], rows[k] - rows[j]
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    return {triplet: cosine(*triplet) for triplet in permutations(range(len(rows)), 3)}


@pytest.mark.parametrize(("potential", "weights"), [(distances, (7.0, 0.0)), (cosines, (0.0, 7.0))])
def test_agrees_with_loops_over_pairs_and_triplets(potential, weights):
    mine, theirs = potential(STUDENT), potential(TEACHER)
    wanted = 7 * sum(huber(mine[each] - theirs[each]) for each in mine) / len(mine)
    assert relations(STUDENT, TEACHER, *weights).item() == pytest.approx(wanted)


def test_is_a_value_worked_by_hand():
    # Distances 1, 1, 2 against 1, 1, 1, over their means 4/3 and 1: 3/4, 3/4, 3/2 against 1: (1/32 + 1/32 + 1/8) / 3.
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert relations(student, teacher, 1.0, 0.0).item() == pytest.approx((1 / 32 + 1 / 32 + 1 / 8) / 3)
    # Cosines at the three rows: 1, -1, 1 on a line against 1/2: the second differs by 1.5, which is linear.
    assert relations(student, teacher, 0.0, 1.0).item() == pytest.approx((1 / 8 + 1 + 1 / 8) / 3)


def test_does_not_mind_where_rows_lie_how_large_they_are_or_how_they_are_turned():
    turn, _ = np.linalg.qr(DRAW.normal(size=(5, 5)))
    assert relations(3 * TEACHER @ turn + 4, TEACHER).item() == pytest.approx(0, abs=1e-12)


def test_its_gradient_is_the_finite_difference():
    student = torch.tensor(STUDENT, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: relations(given, TEACHER), student)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_equal_rows_and_few_rows_have_finite_gradients(rows):
    student = torch.ones(rows, 3, requires_grad=True)
    relations(student, torch.randn(rows, 4)).backward()
    assert torch.isfinite(student.grad).all()


def test_compares_the_outputs_where_no_layers_are_named():
    labels, task = torch.arange(6) % 2, Classification()
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER[:, :2].copy())
    value = RelationalKnowledge(distance_weight=2.0, angle_weight=3.0).loss(student, teacher, labels, task)
    wanted = SoftLabels().loss(student, teacher, labels, task) + relations(student, teacher, 2.0, 3.0)
    torch.testing.assert_close(value, wanted)
    named = RelationalKnowledge(student_layers=("a",), teacher_layers=("b",))
    assert named.loss(student, teacher, labels, task) == SoftLabels().loss(student, teacher, labels, task)


def test_embeddings_need_no_targets():
    teacher = torch.tensor(TEACHER)
    assert RelationalKnowledge().loss(teacher, teacher, torch.empty(6, 0), Similarity()).item() == pytest.approx(0)


def test_without_a_weight_there_is_nothing_to_compare():
    with pytest.raises(ConfigError, match=r"distance_weight and distillation\.angle_weight must not both be 0"):
        RelationalKnowledge(distance_weight=0.0, angle_weight=0.0)
