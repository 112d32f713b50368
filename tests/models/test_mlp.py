"""The fully connected network."""

import numpy as np
import pytest
import torch

from hasten.models.mlp import MLP


def test_computes_affine_maps_with_relu_between_them():
    torch.manual_seed(0)
    model = MLP(input_shape=(2, 3), num_outputs=4, hidden=(5, 7))
    x = torch.randn(3, 2, 3)
    first, second, last = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in model.layers
        if isinstance(layer, torch.nn.Linear)
    )
    h = np.maximum(x.numpy().reshape(3, 6) @ first[0].T + first[1], 0)
    h = np.maximum(h @ second[0].T + second[1], 0)
    np.testing.assert_allclose(model(x).detach().numpy(), h @ last[0].T + last[1], rtol=1e-5, atol=1e-6)


def test_without_hidden_layers_it_is_linear():
    model = MLP(input_shape=(6,), num_outputs=3, hidden=())
    assert sum(p.numel() for p in model.parameters()) == 6 * 3 + 3


def test_the_default_has_the_parameters_of_its_layers():
    model = MLP(input_shape=(1, 8, 8), num_outputs=10)
    assert sum(p.numel() for p in model.parameters()) == 64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


@pytest.mark.parametrize("sizes", [{"hidden": (4, 0)}, {"num_outputs": 0}, {"input_shape": (0, 3)}])
def test_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="every size must be at least 1"):
        MLP(**{"input_shape": (4,), "num_outputs": 2, **sizes})
