"""FLOPs and parameters at any widths, and the widths that meet a target."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hasten.artefacts import module as artefact
from hasten.artefacts.capture import capture, count
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Input, Rows, Signature
from hasten.passes.pruning.allocation import BINS, knapsack
from hasten.passes.pruning.costs import costs
from hasten.passes.pruning.groups import removal
from hasten.passes.pruning.importance import rank
from hasten.passes.pruning.structured import StructuredPruning
from hasten.passes.pruning.surgery import structure, without

SHAPE = (1, 8, 8)
RESNET = {"_target_": "hasten.models.resnet.ResNet", "widths": [16, 32], "num_blocks": 1}
IMAGES = {"input": np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)}


class Bench:
    seed = 0

    def __init__(self, **inputs):
        self.train = Rows(inputs=inputs, targets=np.arange(32) % 3)
        self.fitted = []

    def fit(self, model):
        self.fitted.append(model)
        return model.eval()


def built(arch, inputs):
    return artefact.build(arch, inputs, (3,), seed=0, facts={"vocabulary_size": 20})[0].eval()


def resnet():
    return built(RESNET, (Input(shape=SHAPE),))


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    return counter.get_total_flops()


def some_widths(groups):
    draw = np.random.default_rng(0)
    return {group.name: int(draw.choice(group.widths)) for group in groups}


TEXTS = tuple(Input(name=name, shape=(6,), dtype="int64") for name in ("ids", "mask"))
KINDS = {
    "residual": (RESNET, (Input(shape=SHAPE),)),
    "depthwise": (
        {"_target_": "hasten.models.depthwise.DepthwiseCNN", "widths": [8, 16], "expansion": 2},
        (Input(shape=SHAPE),),
    ),
    "recurrent": (
        {"_target_": "hasten.models.recurrent.Recurrent", "hidden": 12, "num_layers": 2},
        (Input(shape=(3, 9)),),
    ),
    "transformer": (
        {"_target_": "hasten.models.transformer.Transformer", "width": 16, "num_layers": 2, "feedforward": 24},
        TEXTS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_network_that_is_built(kind):
    arch, inputs = KINDS[kind]
    model, example = built(arch, inputs), artefact.example(inputs)
    groups = structure(model, example, round_to=2, heads=True).groups
    ranked = rank(model, groups, "l1", Bench())
    counted = costs(model, groups, example)
    for kept in ({group.name: group.num_units for group in groups}, some_widths(groups)):
        pruned = without(model, example, groups, removal(ranked, kept))
        cost = count(capture(pruned, Signature(inputs=inputs, output_shape=(3,))))
        assert counted.parameters(kept) == num_parameters(pruned)
        arithmetic = sum(cost.flops.get(operator, 0) for operator in ("convolution", "linear"))
        assert counted.flops(kept) == arithmetic


@pytest.mark.parametrize(("knob", "cost"), [("flops_cut", flops), ("parameters_cut", num_parameters)])
@pytest.mark.parametrize("cut", [0.3, 0.6])
@pytest.mark.parametrize("importance", ["l2", "random"])
def test_a_cut_is_met_and_not_by_much(knob, cost, cut, importance):
    model = resnet()
    technique = StructuredPruning(sparsity=None, **{knob: cut}, importance=importance, round_to=2)
    left = cost(technique(model, Bench(**IMAGES)).model) / cost(model)
    assert 1 - cut - 0.06 < left <= 1 - cut


def test_a_cut_of_flops_takes_them_where_they_cost_the_least_importance():
    model = resnet()
    block = model.blocks[0]
    with torch.no_grad():  # half of the channels between the block's convolutions do nothing
        block.convolution1.weight[:8] = 0
        block.normalization1.weight[:8] = 0
        block.convolution2.weight[:, :8] = 0
    surgery = StructuredPruning(sparsity=None, flops_cut=0.1)(model, Bench(**IMAGES))
    ((layer, channels),) = surgery.steps[0]["removed"].items()
    assert layer == "blocks.0.convolution1"
    assert set(channels) <= set(range(8))


def test_global_sparsity_takes_units_from_where_they_matter_least():
    torch.manual_seed(0)
    model = built({"_target_": "hasten.models.mlp.MLP", "hidden": [32, 32]}, (Input(shape=(5,)),))
    with torch.no_grad():
        model.layers[1].weight[:20] *= 0.01
        model.layers[3].weight[:, :20] *= 0.01
    rows = {"input": np.zeros((32, 5), dtype=np.float32)}
    pruned = StructuredPruning(sparsity=0.25, scope="global", round_to=2)(model, Bench(**rows)).model
    assert [layer.out_features for layer in pruned.layers if hasattr(layer, "weight")] == [16, 32, 3]


@pytest.mark.parametrize("knobs", [{"sparsity": 0.75}, {"sparsity": None, "flops_cut": 0.7}])
def test_rounds_end_where_one_would_with_a_training_each(knobs):
    once, thrice = (StructuredPruning(**knobs, rounds=rounds, round_to=2) for rounds in (1, 3))
    bench, model = Bench(**IMAGES), resnet()
    one, surgery = once(model, Bench(**IMAGES)).model, thrice(model, bench)
    ends = [flops(each) / flops(model) for each in (one, surgery.model)]
    assert ends[1] == pytest.approx(ends[0], rel=0.12 if "flops_cut" in knobs else 0)
    sizes = [num_parameters(each) for each in (model, *bench.fitted)]
    assert len(sizes) == 4 == len(surgery.steps) + 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_a_round_in_which_rounding_leaves_nothing_to_remove_is_left_out():
    model = built({"_target_": "hasten.models.mlp.MLP", "hidden": [8]}, (Input(shape=(5,)),))
    bench = Bench(input=np.zeros((32, 5), dtype=np.float32))
    surgery = StructuredPruning(sparsity=0.6, rounds=4)(model, bench)
    assert len(bench.fitted) == len(surgery.steps) == 1
    assert surgery.model.layers[1].out_features == 4


@pytest.mark.parametrize(
    "knobs", [{}, {"sparsity": 0.5, "flops_cut": 0.5}, {"parameters_cut": 0.1, "latency_cut": 0.1}]
)
def test_refuses_anything_but_one_amount(knobs):
    with pytest.raises(ConfigError, match=r"give one of pruning\.sparsity, pruning\.flops_cut, .* to null, got"):
        StructuredPruning(**{"sparsity": None, **knobs})


def test_refuses_a_cut_that_no_width_reaches():
    technique = StructuredPruning(sparsity=None, parameters_cut=0.99, round_to=8)
    with pytest.raises(
        PassError, match=r"pruning\.parameters_cut=0\.99 can't be reached: the narrowest widths cut 0\."
    ):
        technique(resnet(), Bench(**IMAGES))


def test_leaves_its_input_alone():
    model = resnet().train()
    before = copy.deepcopy(model.state_dict())
    StructuredPruning(sparsity=None, flops_cut=0.3)(model, Bench(**IMAGES))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(
        st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    budget=st.floats(-10, 10),
)
def test_the_knapsack_is_as_good_as_trying_everything(lists, budget):
    losses = [np.array([loss for loss, _ in options]) for options in lists]
    prices = [np.array([price for _, price in options]) for options in lists]

    def total(values, picked):
        return math.fsum(value[place] for value, place in zip(values, picked, strict=True))

    every = list(itertools.product(*(range(len(options)) for options in lists)))
    picked = knapsack(losses, prices, budget)
    cheapest = min(total(prices, each) for each in every)
    if picked is None:
        assert cheapest > budget - 1e-6
        return
    assert total(prices, picked) <= budget + 1e-6
    # Costs are rounded up to bins, so that what just fits may be passed over, and nothing more.
    room = len(lists) * max(0.0, budget - cheapest) / BINS
    surely = [total(losses, each) for each in every if total(prices, each) <= budget - room - 1e-9]
    assert not surely or total(losses, picked) <= min(surely) + 1e-9
