"""The residual CNN."""

import copy
from typing import get_type_hints

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from hasten.models.resnet import ResNet


def test_has_the_parameters_that_its_widths_imply():
    model = ResNet(input_shape=(3, 8, 8), num_outputs=5, widths=(4, 6), num_blocks=2)
    stem = 3 * 4 * 9 + 2 * 4
    first = 2 * (2 * (4 * 4 * 9) + 2 * 2 * 4)
    second = (4 * 6 * 9 + 6 * 6 * 9 + 2 * 2 * 6) + (4 * 6 + 2 * 6) + (2 * (6 * 6 * 9) + 2 * 2 * 6)
    assert sum(p.numel() for p in model.parameters()) == stem + first + second + 6 * 5 + 5


def test_the_default_has_the_million_parameters_that_its_experiment_promises():
    model = ResNet(input_shape=(1, 8, 8), num_outputs=10)
    assert sum(p.numel() for p in model.parameters()) == 1_084_010


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 1)])
def test_gives_one_output_per_class_for_images_of_any_size(shape):
    model = ResNet(input_shape=shape, num_outputs=4, widths=(3, 5, 2), num_blocks=1).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


def test_every_stage_after_the_first_halves_the_image():
    model = ResNet(input_shape=(1, 8, 6), num_outputs=2, widths=(3, 4, 5), num_blocks=2).eval()
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 1, 8, 6))
    assert sizes == [(3, 8, 6)] * 2 + [(4, 4, 3)] * 2 + [(5, 2, 2)] * 2


def test_a_block_whose_convolutions_are_silent_passes_its_input_on():
    model = ResNet(input_shape=(1, 4, 4), num_outputs=2, widths=(3,), num_blocks=1).eval()
    block = model.blocks[0]
    nn.init.zeros_(block.normalization2.weight)
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_exports_with_any_batch_size():
    model = ResNet(input_shape=(1, 8, 8), num_outputs=3, widths=(2, 4), num_blocks=1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = torch.export.export(model, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},)).module()
    x = torch.rand(7, 1, 8, 8)
    torch.testing.assert_close(graph(x), model(x))


def test_outputs_follow_each_row_alone_in_eval_mode():
    model = ResNet(input_shape=(1, 8, 8), num_outputs=3, widths=(2, 4), num_blocks=1).eval()
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(x)[1:2], copy.deepcopy(model)(x[1:2]))


def test_refuses_rows_that_are_no_images():
    with pytest.raises(ValueError, match=r"input_shape \(channels, height, width\).*, got \(28, 28\)"):
        ResNet(input_shape=(28, 28), num_outputs=10)


@pytest.mark.parametrize("sizes", [{"widths": ()}, {"widths": (4, 0)}, {"num_blocks": 0}, {"num_outputs": 0}])
def test_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=f"ResNet: {next(iter(sizes))} must be at least 1"):
        ResNet(**{"input_shape": (1, 8, 8), "num_outputs": 10, **sizes})


def test_its_annotations_refuse_the_same():
    hints = get_type_hints(ResNet.__init__, include_extras=True)
    TypeAdapter(hints["widths"]).validate_python([16, 32])
    for name, value in {"widths": [], "num_blocks": 0, "num_outputs": 0}.items():
        with pytest.raises(ValidationError):
            TypeAdapter(hints[name]).validate_python(value)
