"""The distance between layers against its formula."""

import pytest
import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.passes.distillation.features import FeatureMaps
from hasten.passes.distillation.outputs import OutputMatching
from hasten.passes.distillation.soft_labels import SoftLabels
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression

METHOD = FeatureMaps(weight=2.0)


def test_averages_the_larger_map_to_the_places_of_the_smaller():
    # A student of 2x2 pixels with mean 2.5 against one pixel of 2: 2 * 0.5^2.
    student, teacher = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[[2.0]]]])
    assert METHOD.layer_loss([student], [teacher], [nn.Identity()]).item() == pytest.approx(0.5)
    assert METHOD.layer_loss([teacher], [student], [nn.Identity()]).item() == pytest.approx(0.5)


def test_projects_the_students_channels_onto_the_teachers():
    # 1 * 3 + 2 * 4 + 0.5 = 11.5 against 10: 2 * 1.5^2.
    (projection,) = METHOD.projections([(1, 2)], [(1, 1)])
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[[1.0], [2.0]]]))
        projection.bias.fill_(0.5)
    value = METHOD.layer_loss([torch.tensor([[3.0, 4.0]])], [torch.tensor([[10.0]])], [projection])
    assert value.item() == pytest.approx(4.5)


def test_projects_only_where_channels_differ():
    kinds = [type(each) for each in METHOD.projections([(4, 8, 3, 3), (4, 8, 3, 3)], [(4, 8, 9, 9), (4, 6, 3, 3)])]
    assert kinds == [nn.Identity, nn.Conv1d]


def test_is_the_mean_over_the_pairs_of_layers():
    one, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    same = [nn.Identity(), nn.Identity()]
    assert METHOD.layer_loss([one, one], [other, one], same).item() == pytest.approx(1.0)


@pytest.mark.parametrize("places", [(5,), (5, 3), (4, 3, 2)])
def test_maps_of_any_number_of_axes_are_brought_together(places):
    student, teacher = torch.full((2, 3, *places), 1.0), torch.full((2, 3, *(size - 1 for size in places)), 3.0)
    assert METHOD.layer_loss([student], [teacher], [nn.Identity()]).item() == pytest.approx(8.0)


def test_a_map_meets_a_vector_in_its_mean():
    student, teacher = torch.arange(8.0).reshape(1, 2, 2, 2), torch.tensor([[1.5, 4.5]])
    # Means of the student's channels: 1.5 and 5.5.
    assert METHOD.layer_loss([student], [teacher], [nn.Identity()]).item() == pytest.approx(1.0)


def test_vectors_of_tokens_have_their_channels_last():
    method = FeatureMaps(channel_axis=-1)
    (projection,) = method.projections([(2, 7, 4)], [(2, 7, 6)])
    assert projection.weight.shape == (6, 4, 1)
    student, teacher = torch.randn(2, 7, 4), torch.randn(2, 7, 6)
    by_hand = (student @ projection.weight[:, :, 0].T + projection.bias - teacher).square().mean()
    torch.testing.assert_close(method.layer_loss([student], [teacher], [projection]), by_hand)


def test_its_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.randn(2, 5, 2, 3, dtype=torch.double)
    (projection,) = METHOD.projections([(2, 3, 4, 4)], [(2, 5, 2, 3)])
    projection.double()
    assert torch.autograd.gradcheck(
        lambda given: METHOD.layer_loss([given], [teacher], [projection]), student.requires_grad_()
    )


def test_answers_as_soft_labels_for_classes_and_by_distance_for_numbers():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    method, labels = FeatureMaps(alpha=0.3, temperature=2.0), torch.tensor([0, 1, 2, 0])
    soft = SoftLabels(alpha=0.3, temperature=2.0).loss(student, teacher, labels, Classification())
    assert method.loss(student, teacher, labels, Classification()) == soft
    numbers = torch.randn(4, 3)
    matched = OutputMatching(alpha=0.3).loss(student, teacher, numbers, Regression())
    assert method.loss(student, teacher, numbers, Regression()) == matched


@pytest.mark.parametrize(("student", "teacher"), [(("a",), ("a", "b")), ((), ())])
def test_layers_come_in_pairs(student, teacher):
    with pytest.raises(
        ConfigError, match=r"student_layers and distillation\.teacher_layers must name as many .* 1, got"
    ):
        FeatureMaps(student_layers=student, teacher_layers=teacher)
