"""The one-dimensional CNN."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hasten.core.interfaces import Input
from hasten.models.sequence_cnn import SequenceCNN
from hasten.passes.pruning.structured import StructuredPruning


def small(**more):
    torch.manual_seed(0)
    return SequenceCNN(
        **{"input_shape": (3, 9), "num_outputs": 4, "widths": (5, 6), "kernel_size": 3, "highway": 2, **more}
    )


def test_has_the_parameters_that_its_widths_and_length_imply():
    convolutions = 3 * 5 * 3 + 2 * 5 + 5 * 6 * 3 + 2 * 6
    outputs, highway = 6 * 3 * 4 + 4, 2 * 3 * 4 + 4  # 9 steps, 5, 3
    assert sum(p.numel() for p in small().parameters()) == convolutions + outputs + highway


def test_computes_convolutions_of_every_second_step():
    model = small(widths=(5,), highway=0).eval()
    x = torch.randn(2, 3, 9)
    padded = functional.pad(x, (1, 1))
    weight = model.layers[0].weight
    y = torch.stack([torch.einsum("bck,ock->bo", padded[:, :, i : i + 3], weight) for i in range(0, 9, 2)], dim=2)
    y = (y / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(model(x), model.output(y.flatten(1)))


def test_the_highway_adds_a_linear_map_of_the_last_steps():
    model = small().eval()
    nn.init.zeros_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    x = torch.randn(2, 3, 9)
    last = x[:, :, [-2, -1]].reshape(2, 6)
    torch.testing.assert_close(model(x), last @ model.highway.weight.T + model.highway.bias)


@pytest.mark.parametrize("length", [1, 2, 7, 96])
def test_takes_sequences_of_any_length(length):
    assert small(input_shape=(3, length), highway=1).eval()(torch.zeros(2, 3, length)).shape == (2, 4)


def test_every_parameter_learns(assert_all_learn):
    assert_all_learn(small(), input=torch.randn(8, 3, 9))


@pytest.mark.slow
def test_engines_agree_for_any_batch(engines, assert_engines_agree):
    model = small().eval()
    running = engines(model, Input(shape=(3, 9)), num_outputs=4)
    for rows in (1, 2, 5):
        assert_engines_agree(running, model, input=torch.randn(rows, 3, 9))


def test_can_be_pruned(untrained):
    bench = untrained(input=np.random.default_rng(0).normal(size=(8, 3, 9)).astype(np.float32))
    pruned = StructuredPruning(sparsity=0.5)(small(widths=(8, 16)), bench).model
    assert (pruned.layers[0].out_channels, pruned.layers[3].out_channels, pruned.output.in_features) == (4, 8, 8 * 3)
    assert pruned(torch.zeros(2, 3, 9)).shape == (2, 4)


@pytest.mark.parametrize("shape", [(9,), (1, 8, 8), (0, 9)])
def test_refuses_rows_that_are_no_sequences(shape):
    with pytest.raises(ValueError, match=r"SequenceCNN needs rows of input_shape \(channels, length\), got \("):
        small(input_shape=shape)


@pytest.mark.parametrize("sizes", [{"widths": ()}, {"widths": (4, 0)}, {"kernel_size": 0}, {"num_outputs": 0}])
def test_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=f"SequenceCNN: {next(iter(sizes))} must be at least 1"):
        small(**sizes)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"highway": 10}, r"highway must be in \[0, 9\], the length of a row, got 10"),
    ],
)
def test_refuses_what_it_can_not_be(argument, problem):
    with pytest.raises(ValueError, match=f"SequenceCNN: {problem}"):
        small(**argument)
