"""What a training step asks for, found without calculating it."""

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.core.interfaces import Input
from hasten.core.sections import Step
from hasten.core.tensor_plan import TensorPlan
from hasten.distributed.footprint import deepened
from hasten.models.resnet import ResNet
from hasten.models.transformer import Transformer
from hasten.tasks.classification import Classification
from hasten.training.footprint import footprint

TARGETS = torch.zeros(1, dtype=torch.long)
VECTOR = [Input(name="input", shape=(16,), dtype="float32")]
IMAGE = [Input(name="input", shape=(3, 8, 8), dtype="float32")]
TOKENS = [Input(name=name, shape=(12,), dtype="int64") for name in ("ids", "mask")]


def look(make, inputs, **knobs):
    return footprint(make, inputs, TARGETS, Classification(), knobs.pop("step", Step()), **knobs)


def chain():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def transformer(depth):
    return Transformer(
        input_shape=(12,), vocabulary_size=20, num_outputs=4, width=16, num_heads=2, num_layers=depth, feedforward=32
    )


def test_a_chain_of_layers_by_hand():
    found = look(chain, VECTOR)
    assert [weight.size_bytes for weight in found.weights] == [16 * 32 * 4, 32 * 4, 32 * 4 * 4, 4 * 4]
    assert found.trained_bytes == found.given_bytes == found.weight_bytes
    assert found.buffer_bytes == 0
    # ReLU keeps its output, which the next layer has too; log-softmax its own, and the loss the number of rows.
    kept = found.saved_bytes(100) - found.saved_bytes(0)
    assert kept == pytest.approx(100 * 4 * (32 + 4))
    # Forward and two products backward, but for the first layer, whose inputs need no gradient.
    assert found.flops(10) == 10 * 2 * (2 * 16 * 32 + 3 * 32 * 4)
    assert found.state_share == pytest.approx(2, rel=0.05)  # two states, and a counter each


def test_nothing_is_allocated_for_a_model_that_would_not_fit():
    found = look(lambda: nn.Linear(2**18, 2**20), [Input(name="input", shape=(2**18,), dtype="float32")])
    assert found.weight_bytes == 4 * (2**38 + 2**20)  # a terabyte


def test_temporaries_of_the_optimizer():
    shares = {
        kernels: look(chain, VECTOR, step=Step(optimizer_kernels=kernels)).update_share
        for kernels in ("fused", "foreach")
    }
    assert shares["fused"] == 0
    assert shares["foreach"] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("depth", [8, 5])
def test_depth_in_closed_form_is_what_the_model_itself_gives(depth):
    two, four, direct = (look(lambda depth=depth: transformer(depth), TOKENS) for depth in (2, 4, depth))
    found = deepened(two, four, depth)
    assert found.parts == direct.parts
    assert found.given_bytes == direct.given_bytes


def test_depth_of_a_network_with_blocks_in_each_of_its_stages():
    def made(depth):
        return look(lambda: ResNet(input_shape=(3, 8, 8), num_outputs=4, widths=(4, 8), num_blocks=depth), IMAGE)

    found, direct = deepened(made(2), made(4), 8), made(8)
    assert (found.weight_bytes, found.buffer_bytes) == (direct.weight_bytes, direct.buffer_bytes)
    assert found.saved_bytes(64) == direct.saved_bytes(64)
    assert found.flops(64) == direct.flops(64)


def test_blocks_are_those_that_fsdp_collects():
    found = look(lambda: transformer(3), TOKENS)
    layers = [unit for unit in found.units if sum(part.weight_bytes for part in unit) > 5000]
    assert len(layers) == 3
    assert all(unit[0].inside for unit in layers)


def test_batch_normalization_over_all_processes_keeps_more():
    def made():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    assert look(made, IMAGE, alone=False).saved_bytes(8) > look(made, IMAGE).saved_bytes(8)


def test_a_plan_divides_weights_activations_and_arithmetic():
    plan = TensorPlan(layers={"0": "column", "2": "row"})
    whole, half = look(chain, VECTOR), look(chain, VECTOR, plan=plan, tensor=2)
    assert half.given_bytes == whole.given_bytes
    assert half.weight_bytes == (whole.weight_bytes - 4 * 4) / 2 + 4 * 4  # the bias of the sum is whole
    assert half.flops(8) == whole.flops(8) / 2
    assert sum(part.num_summed for part in half.parts) == 2
    assert sum(part.summed(8) for part in half.parts) == 2 * 8 * 4 * 4


def test_a_model_that_needs_its_values_is_refused_in_one_line():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, rows):
            return self.layer(rows) if rows.sum() > 0 else self.layer(-rows)

    with pytest.raises(HastenError, match="can't be looked at without calculating"):
        look(Picky, VECTOR)
