"""Outputs for many rows."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.training.predict import predict

ROWS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
INPUTS = {"input": ROWS}


@pytest.mark.parametrize("batch_size", [1, 4, 10, 99])
def test_gives_each_row_its_logits_whatever_the_batch(batch_size):
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    np.testing.assert_allclose(predict(model, INPUTS, batch_size), ROWS @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_works_in_eval_mode_and_leaves_the_model_in_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2))
    model[1].eval()
    mean = model[1].running_mean.clone()
    assert np.array_equal(predict(model, INPUTS, 4), predict(model, INPUTS, 4))
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training
    assert torch.equal(mean, model[1].running_mean)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_several_inputs_are_cut_at_the_same_rows(batch_size):
    class Weighted(nn.Module):
        def forward(self, weight, ids):
            return ids * weight

    inputs = {"ids": np.arange(20).reshape(10, 2), "weight": np.arange(10, dtype=np.float32)[:, None]}
    np.testing.assert_array_equal(predict(Weighted(), inputs, batch_size), inputs["ids"] * inputs["weight"])


def test_outputs_of_any_rank_stay_as_they_are():
    assert predict(nn.Unflatten(1, (3, 1)), INPUTS, 4).shape == (10, 3, 1)
