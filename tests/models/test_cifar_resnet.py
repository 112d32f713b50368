"""The residual CNN whose shortcuts have no parameters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hasten.core.interfaces import Input
from hasten.models.cifar_resnet import Block, CifarResNet
from hasten.passes.pruning.structured import StructuredPruning, estimate_statistics


def small(**more):
    torch.manual_seed(0)
    return CifarResNet(**{"input_shape": (3, 8, 8), "num_outputs": 4, "num_blocks": 2, "widths": (4, 6, 9), **more})


def unsettled(model):
    """The model with statistics of batch normalization that are not those of a fresh one."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else -0.5))
    return model.eval()


@pytest.mark.parametrize(("num_blocks", "num_parameters"), [(3, 269_722), (9, 853_018)], ids=["20", "56"])
def test_has_the_parameters_of_the_published_networks(num_blocks, num_parameters):
    model = CifarResNet(input_shape=(3, 32, 32), num_outputs=10, num_blocks=num_blocks)
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_has_the_parameters_that_its_widths_imply():
    stem = 3 * 4 * 9 + 2 * 4
    first = 4 * (4 * 4 * 9 + 2 * 4)
    second = 4 * 6 * 9 + 3 * 6 * 6 * 9 + 4 * 2 * 6
    third = 6 * 9 * 9 + 3 * 9 * 9 * 9 + 4 * 2 * 9
    assert sum(p.numel() for p in small().parameters()) == stem + first + second + third + 9 * 4 + 4


def test_has_the_names_of_the_published_weights():
    normalization = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["conv1.weight", "conv2.weight", *(f"bn{i}.{name}" for i in (1, 2) for name in normalization)]
    stages = [f"layer{stage}.{place}.{name}" for stage in (1, 2, 3) for place in range(3) for name in block]
    ends = ["conv1.weight", *(f"bn1.{name}" for name in normalization), "linear.weight", "linear.bias"]
    assert set(CifarResNet(input_shape=(3, 32, 32), num_outputs=10, num_blocks=3).state_dict()) == {*stages, *ends}


def test_computes_what_the_published_code_computes():
    model = unsettled(small())
    x = torch.randn(2, 3, 8, 8)

    def normalized(layer, y):
        return functional.batch_norm(y, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    y = normalized(model.bn1, functional.conv2d(x, model.conv1.weight, padding=1)).relu()
    for stage, new in (("layer1", 0), ("layer2", 2), ("layer3", 3)):
        for place, block in enumerate(getattr(model, stage)):
            stride = 2 if new and place == 0 else 1
            inner = functional.conv2d(y, block.conv1.weight, stride=stride, padding=1)
            inner = functional.conv2d(normalized(block.bn1, inner).relu(), block.conv2.weight, padding=1)
            if stride == 2:
                y = functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))
            y = (normalized(block.bn2, inner) + y).relu()
    torch.testing.assert_close(model(x), model.linear(functional.avg_pool2d(y, y.shape[3]).flatten(1)))


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 9, 8)])
def test_takes_images_of_any_size(shape):
    assert small(input_shape=shape).eval()(torch.zeros(2, *shape)).shape == (2, 4)


def test_a_block_whose_convolutions_are_silent_passes_its_input_on_between_zeros():
    block = Block(2, 5, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 3, 3)
    (y,) = block(x)
    torch.testing.assert_close(y[1:3], x[0, :, ::2, ::2])
    assert not y[[0, 3, 4]].any()


def test_every_parameter_learns(assert_all_learn):
    assert_all_learn(small(), input=torch.randn(4, 3, 8, 8))


@pytest.mark.slow
def test_engines_agree_for_any_batch(engines, assert_engines_agree):
    model = unsettled(small())
    running = engines(model, Input(shape=(3, 8, 8)), num_outputs=4)
    for rows in (1, 2, 5):
        assert_engines_agree(running, model, input=torch.randn(rows, 3, 8, 8))


def test_pruning_takes_the_inner_channels_of_blocks_and_computes_the_same_without_them(untrained):
    model = unsettled(small(widths=(8, 16, 24)))
    bench = untrained(input=np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32))
    surgery = StructuredPruning(sparsity=0.5)(model, bench)
    removed = surgery.steps[0]["removed"]
    assert {name: len(channels) for name, channels in removed.items()} == {
        f"layer{stage}.{place}.conv1": num for stage, num in ((1, 4), (2, 8), (3, 12)) for place in (0, 1)
    }
    for name, channels in removed.items():
        model.get_submodule(name.replace("conv1", "conv2")).weight.data[:, channels] = 0
    estimate_statistics(model, bench.train.inputs)
    x = torch.from_numpy(bench.train.inputs["input"])
    torch.testing.assert_close(surgery.model(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(28, 28), (3, 8), (3, 0, 8)])
def test_refuses_rows_that_are_no_images(shape):
    with pytest.raises(ValueError, match=r"CifarResNet needs rows of input_shape \(channels, height, width\), got \("):
        small(input_shape=shape)


@pytest.mark.parametrize("sizes", [{"widths": ()}, {"widths": (4, 0)}, {"num_blocks": 0}, {"num_outputs": 0}])
def test_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=f"CifarResNet: {next(iter(sizes))} must be at least 1, got "):
        small(**sizes)


def test_refuses_widths_that_shrink():
    with pytest.raises(ValueError, match=r"CifarResNet: widths must not decrease, .* got \[8, 4\]"):
        small(widths=(8, 4))


def test_asks_for_outputs_that_nobody_gives():
    with pytest.raises(ValueError, match="CifarResNet: num_outputs is null, and the data and the task don't say it"):
        small(num_outputs=None)
