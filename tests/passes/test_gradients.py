"""Gradients of the task's loss on training rows."""

import copy

import numpy as np
import torch
from torch import nn

from hasten.core.interfaces import Rows
from hasten.passes.pruning.gradients import batch_gradients, mean_gradients
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression


def test_is_the_gradient_of_the_mean_loss_over_all_rows_whatever_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    rng = np.random.default_rng(0)
    rows = Rows(inputs={"input": rng.normal(size=(10, 4)).astype(np.float32)}, targets=np.arange(10) % 3)
    given = mean_gradients(model, rows, Classification(), batch_size=4)
    other = copy.deepcopy(model).eval()
    nn.functional.cross_entropy(
        other(torch.from_numpy(rows.inputs["input"])), torch.from_numpy(rows.targets)
    ).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad)


def test_is_what_a_hand_computes():
    # Loss (w x - y)^2 of the rows (x, y) = (1, 0), (2, 1) at w = 3: gradients 2 x (w x - y) = 6 and 20.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    rows = Rows(
        inputs={"input": np.array([[1.0], [2.0]], np.float32)}, targets=np.array([[0.0], [1.0]], dtype=np.float32)
    )
    by_batch = [gradients["weight"].item() for _, gradients in batch_gradients(model, rows, Regression(), batch_size=1)]
    assert by_batch == [6.0, 20.0]
    assert mean_gradients(model, rows, Regression())["weight"].item() == 13.0


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_leaves_the_model_alone_and_gives_frozen_and_unused_parameters_a_gradient():
    model = Partly().train()
    model.used.bias.requires_grad_(False)
    rows = Rows(inputs={"input": np.ones((6, 2), np.float32)}, targets=np.arange(6) % 2)
    with torch.no_grad():
        gradients = mean_gradients(model, rows, Classification())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.used.bias.requires_grad
    assert gradients["used.weight"].abs().sum() > 0
    assert gradients["unused.weight"].abs().sum() == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()


def test_takes_rows_from_the_whole_of_a_sorted_file():
    model = nn.Linear(1, 2, bias=False)
    rows = Rows(inputs={"input": np.arange(1000, dtype=np.float32)[:, None]}, targets=np.repeat([0, 1], 500))
    seen = sum(number for number, _ in batch_gradients(model, rows, Classification(), max_rows=100, batch_size=30))
    assert seen == 100
    some = mean_gradients(model, rows, Classification(), max_rows=100)["weight"]
    everything = mean_gradients(model, rows, Classification(), max_rows=1000)["weight"]
    torch.testing.assert_close(some, everything, rtol=0.05, atol=0)
