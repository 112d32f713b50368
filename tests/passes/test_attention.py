"""The distance between attention maps against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.passes.distillation.attention import AttentionTransfer

METHOD = AttentionTransfer(weight=3.0)


def loss(student, teacher, method=METHOD):
    return method.layer_loss([torch.as_tensor(student)], [torch.as_tensor(teacher)], [])


def test_is_a_value_worked_by_hand():
    # Squares over the channels: (1 + 4, 0 + 0) is the direction (1, 0), (9, 16) is (9, 16) / sqrt(337).
    student, teacher = [[[[1.0, 0.0]], [[2.0, 0.0]]]], [[[[3.0, 4.0]]]]
    root = np.sqrt(337)
    assert loss(student, teacher).item() == pytest.approx(3 * ((1 - 9 / root) ** 2 + (16 / root) ** 2))


def test_agrees_with_another_implementation():
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(size=(4, 3, 5, 5)), draw.normal(size=(4, 7, 5, 5))

    def maps(features):
        flat = (features**2).sum(1).reshape(4, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    wanted = 3 * ((maps(student) - maps(teacher)) ** 2).sum(1).mean()
    assert loss(student, teacher).item() == pytest.approx(wanted)


@given(st.floats(0.01, 100))
def test_does_not_mind_the_scale(scale):
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert loss(features, scale * features).item() == pytest.approx(0, abs=1e-12)


def test_maps_of_other_sizes_are_averaged_to_the_smaller():
    student = torch.zeros(1, 1, 4, 4)
    student[0, 0, :2, :2] = 1.0  # looks at the top left, as a map of 2x2 does
    assert loss(student, torch.tensor([[[[5.0, 0.0], [0.0, 0.0]]]])).item() == pytest.approx(0)


def test_tokens_are_places_where_channels_are_last():
    student, teacher = torch.randn(2, 6, 3), torch.randn(2, 6, 8)
    last = loss(student, teacher, AttentionTransfer(weight=3.0, channel_axis=-1))
    torch.testing.assert_close(last, loss(student.movedim(2, 1), teacher.movedim(2, 1)))


def test_its_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.randn(2, 5, 2, 3, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda given: loss(given, teacher), student.requires_grad_())


@pytest.mark.parametrize(("student", "teacher"), [((4, 8), (4, 8)), ((4, 8, 3, 3), (4, 8, 9))])
def test_refuses_layers_that_look_nowhere(student, teacher):
    with pytest.raises(ConfigError, match=r"with the same axes, places among them, got blocks \(4, 8.* and blocks \(4"):
        METHOD.projections([student], [teacher])
