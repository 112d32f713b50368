"""The CNN of depthwise and pointwise convolutions."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.interfaces import Input
from hasten.models.depthwise import DepthwiseCNN, InvertedResidual
from hasten.passes.pruning.structured import StructuredPruning


def small(**more):
    torch.manual_seed(0)
    return DepthwiseCNN(**{"input_shape": (1, 8, 8), "num_outputs": 3, "widths": (4, 6), "num_blocks": 2, **more})


def separable(num_inputs, num_outputs):
    return num_inputs * 9 + 2 * num_inputs + num_inputs * num_outputs + 2 * num_outputs


def inverted(num_inputs, num_outputs, expansion):
    inner = num_inputs * expansion
    return num_inputs * inner + 2 * inner + inner * 9 + 2 * inner + inner * num_outputs + 2 * num_outputs


def test_has_the_parameters_that_its_widths_imply():
    stem, classifier = 1 * 4 * 9 + 2 * 4, 6 * 3 + 3
    mobilenet = 2 * separable(4, 4) + separable(4, 6) + separable(6, 6)
    assert sum(p.numel() for p in small().parameters()) == stem + mobilenet + classifier
    mobilenet2 = 2 * inverted(4, 4, 3) + inverted(4, 6, 3) + inverted(6, 6, 3)
    assert sum(p.numel() for p in small(expansion=3).parameters()) == stem + mobilenet2 + classifier


def test_no_convolution_of_a_block_mixes_pixels_and_channels():
    for model in (small(), small(expansion=2)):
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Conv2d):
                assert (layer.kernel_size == (1, 1)) != (layer.groups == layer.in_channels == layer.out_channels)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_every_stage_after_the_first_halves_the_image(stem_stride):
    model = small(input_shape=(3, 8, 12), stem_stride=stem_stride, num_blocks=1).eval()
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, 8, 12))
    assert sizes == [(4, 8 // stem_stride, 12 // stem_stride), (6, 4 // stem_stride, 6 // stem_stride)]


@pytest.mark.parametrize("shape", [(1, 40, 33), (3, 5, 5), (2, 1, 1)])
@pytest.mark.parametrize("expansion", [1, 2])
def test_takes_images_and_spectrograms_of_any_size(shape, expansion):
    assert small(input_shape=shape, expansion=expansion).eval()(torch.zeros(2, *shape)).shape == (2, 3)


def test_an_inverted_residual_whose_layers_are_silent_passes_its_input_on():
    block = InvertedResidual(3, 3, stride=1, expansion=2).eval()
    nn.init.zeros_(block.layers[-1].weight)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("expansion", [1, 2])
def test_every_parameter_learns(expansion, assert_all_learn):
    assert_all_learn(small(expansion=expansion), input=torch.randn(8, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("expansion", [1, 2])
def test_engines_agree_for_any_batch(expansion, engines, assert_engines_agree):
    model = small(expansion=expansion).eval()
    running = engines(model, Input(shape=(1, 8, 8)), num_outputs=3)
    for rows in (1, 2, 5):
        assert_engines_agree(running, model, input=torch.randn(rows, 1, 8, 8))


@pytest.mark.parametrize(("expansion", "widths"), [(1, (4, 8)), (2, (4, 8))])
def test_can_be_pruned(expansion, widths, untrained):
    model = small(expansion=expansion, widths=(8, 16))
    bench = untrained(input=np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32))
    pruned = StructuredPruning(sparsity=0.5)(model, bench).model
    assert (pruned.stem[0].out_channels, pruned.classifier.in_features) == widths
    assert pruned(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_refuses_rows_that_are_no_images():
    with pytest.raises(ValueError, match=r"DepthwiseCNN needs rows of input_shape \(channels, height, width\), got \("):
        small(input_shape=(40, 33))


@pytest.mark.parametrize("sizes", [{"widths": ()}, {"widths": (4, 0)}, {"num_blocks": 0}, {"expansion": 0}])
def test_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=f"DepthwiseCNN: {next(iter(sizes))} must be at least 1"):
        small(**sizes)


def test_refuses_a_stride_that_it_does_not_have():
    with pytest.raises(ValueError, match="stem_stride must be 1 or 2, got 3"):
        small(stem_stride=3)
