"""The recurrent network."""

import pytest
import torch
from torch import nn

from hasten.core.interfaces import Input
from hasten.models.recurrent import Recurrent


def small(**more):
    torch.manual_seed(0)
    return Recurrent(**{"input_shape": (3, 9), "num_outputs": 4, "hidden": 5, **more})


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3)])
def test_has_the_parameters_of_its_gates(cell, gates):
    first, second = gates * (3 * 5 + 5 * 5 + 2 * 5), gates * (5 * 5 + 5 * 5 + 2 * 5)
    outputs, highway = 5 * 4 + 4, 2 * 3 * 4 + 4
    model = small(cell=cell, num_layers=2, highway=2)
    assert sum(p.numel() for p in model.parameters()) == first + second + outputs + highway


def test_goes_through_the_steps_in_their_order():
    model = small()
    cell = nn.LSTMCell(3, 5)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.recurrent.state_dict().items()})
    x = torch.randn(2, 3, 9)
    state = (torch.zeros(2, 5), torch.zeros(2, 5))
    for step in range(9):
        state = cell(x[:, :, step], state)
    torch.testing.assert_close(model(x), model.output(state[0]))


def test_the_highway_adds_a_linear_map_of_the_last_steps():
    model = small(highway=2)
    nn.init.zeros_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    x = torch.randn(2, 3, 9)
    last = x[:, :, [-2, -1]].reshape(2, 6)
    torch.testing.assert_close(model(x), last @ model.highway.weight.T + model.highway.bias)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_parameter_learns(cell, assert_all_learn):
    assert_all_learn(small(cell=cell, num_layers=2, highway=1), input=torch.randn(4, 3, 9))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_flat_weights.* were assigned during export:UserWarning")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_engines_agree_for_any_batch(cell, engines, assert_engines_agree):
    model = small(cell=cell, num_layers=2, highway=2).eval()
    running = engines(model, Input(shape=(3, 9)), num_outputs=4)
    for rows in (1, 2, 5):
        assert_engines_agree(running, model, input=torch.randn(rows, 3, 9))


@pytest.mark.parametrize("shape", [(9,), (1, 8, 8), (0, 9)])
def test_refuses_rows_that_are_no_sequences(shape):
    with pytest.raises(ValueError, match=r"Recurrent needs rows of input_shape \(channels, length\), got \("):
        small(input_shape=shape)


@pytest.mark.parametrize("name", ["hidden", "num_layers", "num_outputs"])
def test_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"Recurrent: {name} must be at least 1, got 0"):
        small(**{name: 0})


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ({"cell": "rnn"}, "cell must be lstm or gru, got 'rnn'"),
        ({"highway": 10}, r"highway must be in \[0, 9\], the length of a row, got 10"),
        ({"highway": -1}, r"highway must be in \[0, 9\]"),
    ],
)
def test_refuses_what_it_does_not_have(argument, problem):
    with pytest.raises(ValueError, match=f"Recurrent: {problem}"):
        small(**argument)
