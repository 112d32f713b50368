"""Activations that are calculated again: the same gradients, less that is kept."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten.artefacts.blocks import blocks
from hasten.artefacts.module import forward
from hasten.artefacts.wrapper import Wrapper
from hasten.core.errors import PassError
from hasten.core.sections import Step
from hasten.models.cifar_resnet import CifarResNet
from hasten.models.depthwise import DepthwiseCNN
from hasten.models.mlp import MLP
from hasten.models.resnet import ResNet
from hasten.models.transformer import Transformer
from hasten.training.recompute import Kept, budgeted, choose, measure, recomputing

IMAGES = {"input": torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TOKENS = {"ids": torch.arange(16 * 12).reshape(16, 12) % 50, "mask": torch.ones(16, 12, dtype=torch.int64)}


class Users(nn.Module):
    """Its parts are called in an order that only its code knows, one with a keyword and one twice."""

    class Part(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.one, self.two, self.norm = (
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
                nn.BatchNorm1d(width),
            )

        def forward(self, x, *, scale):
            return self.norm(x + self.two(torch.tanh(self.one(x)) * scale))

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = self.Part(8), self.Part(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(self.second(x.mean((2, 3)).repeat(1, 3)[:, :8], scale=2), scale=torch.ones(()))
        return self.head(self.first(x, scale=0.5))


MODELS = {
    "cifar_resnet": (lambda: CifarResNet(input_shape=(3, 16, 16), num_outputs=3, num_blocks=2), IMAGES),
    "resnet": (lambda: ResNet(input_shape=(3, 16, 16), num_outputs=3, widths=(8, 16), num_blocks=2), IMAGES),
    "mlp": (lambda: MLP(input_shape=(3, 16, 16), num_outputs=3, hidden=(64, 64, 64)), IMAGES),
    "transformer": (
        lambda: Transformer(input_shape=(12,), vocabulary_size=50, num_outputs=3, width=32, num_layers=3, dropout=0.2),
        TOKENS,
    ),
    "depthwise": (lambda: DepthwiseCNN(input_shape=(3, 16, 16), num_outputs=3), IMAGES),
    "user's": (Users, IMAGES),
    "with dropout": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 144, 3),
        ),
        IMAGES,
    ),
}


def made(name):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    return build().train(), inputs


class Allocated(TorchDispatchMode):
    """Knows every piece of memory that was made, and which are still there; no views of weights and inputs."""

    def __init__(self, model, inputs):
        super().__init__()
        self._given = {value.untyped_storage()._cdata for value in (*model.parameters(), *inputs.values())}
        self._made = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                memory = tensor.untyped_storage()
                if memory._cdata not in self._given:
                    self._made[memory._cdata] = (StorageWeakRef(memory), memory.nbytes())
        return result

    def alive_bytes(self):
        return sum(size for memory, size in self._made.values() if not memory.expired())


def step_of(model, inputs):
    """Kept bytes, gradients and buffers of a step."""
    torch.manual_seed(5)
    with Allocated(model, inputs) as allocated:
        loss = forward(model, inputs).square().mean()
        kept = allocated.alive_bytes()
    loss.backward()
    return kept, [parameter.grad.clone() for parameter in model.parameters()], [*map(torch.clone, model.buffers())]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_statistics_are_the_plain_ones_and_less_is_kept(name):
    model, inputs = made(name)
    plain = copy.deepcopy(model)
    _, kept = measure(model, Step(), inputs, 16)
    everything = kept.total_bytes()
    least = kept.total_bytes(choose(kept, 0))
    assert least < 0.8 * everything
    before_bytes, gradients, buffers = step_of(plain, inputs)
    step = Step(activation_budget_mb=(everything + least) / 2 / 1e6)
    with budgeted(model, step, inputs, 16, "teacher"):
        after_bytes, same_gradients, same_buffers = step_of(model, inputs)
    torch.testing.assert_close(same_gradients, gradients)
    torch.testing.assert_close(same_buffers, buffers, rtol=0, atol=0)
    # What it expects is what is there, but for what the loss keeps.
    assert before_bytes == pytest.approx(everything, rel=0.05)
    assert after_bytes < 1.05 * step.activation_budget_mb * 1e6 < before_bytes
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_measured_on_few_rows_holds_for_many():
    model, inputs = made("cifar_resnet")
    for step in (Step(), Step(precision="bfloat16")):
        _, few = measure(model, step, inputs, 64)
        grown = {"input": IMAGES["input"].repeat(4, 1, 1, 1)}
        with (
            Allocated(model, grown) as allocated,
            torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bfloat16"),
        ):
            outputs = model(grown["input"])
            alive = allocated.alive_bytes()
        assert outputs.shape == (64, 3)
        assert alive == pytest.approx(few.total_bytes(), rel=0.1)


def test_looks_inside_of_what_a_pass_put_round_the_model():
    model, inputs = made("with dropout")
    found, _ = measure(Wrapped(model), Step(), inputs, 16)
    assert [block.modules for block in found] == [block.modules for block in blocks(model)]


class Wrapped(Wrapper):
    def forward(self, x):
        return self.model(x)


def test_a_sequence_whose_elements_are_taken_one_by_one_is_no_help():
    class ByHand(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, inputs = made("with dropout")
    _, whole = measure(model, Step(), inputs, 16)
    _, kept = measure(ByHand(model), Step(), inputs, 16)
    assert kept.total_bytes() == whole.total_bytes()
    assert choose(kept, 0) == set()


def test_leaves_the_model_and_the_generator_alone():
    model, inputs = made("with dropout")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure(model, Step(), inputs, 16)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cifar_resnet",
            ["conv1", "bn1", "relu", *(f"layer{n}.{m}" for n in (1, 2, 3) for m in (0, 1)), "pool", "linear"],
        ),
        ("resnet", ["stem.0-stem.2", *(f"blocks.{n}" for n in range(4)), "pool", "classifier"]),
        ("mlp", ["layers.0-layers.4", "layers.5-layers.7"]),
        ("user's", ["first", "second", "head"]),
        ("with dropout", ["0-7", "8"]),
    ],
)
def test_blocks_are_what_a_model_is_made_of(name, expected):
    assert [block.name for block in blocks(made(name)[0])] == expected


def test_in_eval_mode_and_without_gradients_nothing_is_calculated_twice():
    model, inputs = made("with dropout")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with recomputing(blocks(model)[:2]):
        with torch.no_grad():
            model(inputs["input"])
        assert calls == [False]
        model(inputs["input"]).sum().backward()
    assert calls == [False, True, True]


# Three blocks in a row. Each saves 10 bytes of its own and its result (4 bytes), which the next is given.
CHAIN = Kept(
    size_bytes=[10, 4, 10, 4, 10, 4],
    outside=frozenset({5}),
    saved=[frozenset({0, 1}), frozenset({1, 2, 3}), frozenset({3, 4, 5})],
    given=[frozenset(), frozenset({1}), frozenset({3})],
    flops=[0, 1e6, 100],
)


def test_the_cheapest_by_the_byte_are_calculated_again_first():
    assert CHAIN.total_bytes() == 42
    assert choose(CHAIN, 42) == set()
    assert choose(CHAIN, 35) == {0}
    assert CHAIN.total_bytes(frozenset({0})) == 32
    assert choose(CHAIN, 25) == {0, 2}
    assert choose(CHAIN, 0) == {0, 1, 2}
    assert CHAIN.total_bytes(frozenset({0, 1, 2})) == 12
    dear_first = replace(CHAIN, flops=[1e6, 0, 100])
    assert choose(dear_first, 35) == {1}


def test_says_what_was_chosen():
    model, inputs = made("mlp")
    with budgeted(model, Step(activation_budget_mb=500.0), inputs, 16, "teacher") as notes:
        assert notes == ("trainer.activation_budget_mb=500: all activations fit, about 0.0123 MB.",)
    with budgeted(model, Step(), inputs, 16, "teacher") as notes:
        assert notes == ()


def test_refuses_a_budget_that_can_not_be_met_and_says_what_can():
    model, inputs = made("cifar_resnet")
    _, kept = measure(model, Step(), inputs, 16)
    least = kept.total_bytes(choose(kept, 0)) / 1e6
    wanted = rf"^trainer\.activation_budget_mb=0\.01 can't be met: teacher keeps .* MB, and {least:.3g} MB with all"
    with (
        pytest.raises(PassError, match=wanted),
        budgeted(model, Step(activation_budget_mb=0.01), inputs, 16, "teacher"),
    ):
        pass
