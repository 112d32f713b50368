"""What layers give, kept on the way."""

import pytest
import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.models.resnet import ResNet
from hasten.training.layers import LayerOutputs


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, rows):
        return self.used(rows)


def test_keeps_what_the_layers_gave_in_their_order_with_their_gradients():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = LayerOutputs(model, ["1", "0", "1"], "student")
    rows = torch.randn(5, 3)
    model(rows)
    after, before, again = layers.take()
    torch.testing.assert_close(before, model[0](rows))
    torch.testing.assert_close(after, before.relu())
    assert again is after
    after.sum().backward()
    assert model[0].weight.grad is not None


def test_keeps_the_first_of_several_tensors():
    model = nn.LSTM(3, 4, batch_first=True)
    layers = LayerOutputs(nn.Sequential(model), ["0"], "student")
    states, _ = nn.Sequential(model)(torch.randn(2, 5, 3))
    assert torch.equal(layers.take()[0], states)


def test_is_gone_when_it_is_closed():
    model = nn.Sequential(nn.Linear(3, 4))
    layers = LayerOutputs(model, ["0"], "student")
    assert len(model[0]._forward_hooks) == 1
    layers.close()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("blokcs", r"the student has no layer 'blokcs', did you mean 'blocks'\? \(distillation\.student_layers\)"),
        ("zzz", r"no layer 'zzz'; it has stem, blocks, pool, classifier and what is in them \(distillation\.student"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(path, told):
    model = ResNet(input_shape=(1, 8, 8), num_outputs=3, widths=(4,), num_blocks=1)
    with pytest.raises(ConfigError, match=told) as caught:
        LayerOutputs(model, [path], "student")
    assert "\n" not in str(caught.value)


def test_says_which_layer_did_not_run():
    model = Idle()
    layers = LayerOutputs(model, ["used", "unused"], "teacher")
    model(torch.randn(1, 2))
    with pytest.raises(
        ConfigError, match=r"unused did not run for the teacher's outputs \(distillation\.teacher_layers"
    ):
        layers.take()
