"""Where a model is cut into stages, and what the stages are."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hasten.artefacts.module import forward
from hasten.core.errors import PassError
from hasten.core.tensor_plan import TensorPlan
from hasten.distributed.pipeline_cost import measured
from hasten.distributed.pipeline_cut import TOLERANCE, divided, planned
from hasten.distributed.pipeline_trace import Cut, Plain, Traced
from hasten.models.cifar_resnet import CifarResNet
from hasten.models.transformer import Transformer

SEQUENCES = st.integers(1, 9).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(0, 20).map(float), min_size=length, max_size=length),
        st.lists(st.none() | st.integers(0, 5), min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
    )
)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(1, 4))
def test_no_other_cut_has_a_cheaper_stage_or_hands_over_less(sequence, stages):
    costs, moved, trained = sequence

    def worth(borders):
        """Cost of the most expensive stage and bytes, infinite where it can't be cut like that."""
        parts = list(itertools.pairwise(borders))
        if any(moved[place] is None for place in borders[1:-1]) or not all(
            any(trained[slice(*part)]) for part in parts
        ):
            return math.inf, math.inf
        return max(sum(costs[slice(*part)]) for part in parts), sum(moved[place] for place in borders[1:-1])

    every = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), stages - 1)]
    cheapest = min((worth(borders)[0] for borders in every), default=math.inf)
    found = divided(costs, moved, trained, stages)
    if cheapest == math.inf:
        assert found is None
        return
    cost, moved_bytes = worth(found)
    assert cost <= cheapest * (1 + TOLERANCE) + 1e-9
    assert moved_bytes == min(bytes_ for cost, bytes_ in map(worth, every) if cost <= cheapest * (1 + TOLERANCE))


def stages_of(model, inputs, stages, **knobs):
    plan = planned(model, inputs, stages, **knobs)
    traced = Traced(model, list(inputs), plan.cut.opened)
    return traced.stages(plan.cut, plan.given), plan


def outputs_of(stages, inputs):
    values = tuple(inputs.values())
    for stage in stages:
        values = stage(*values)
        values = values if isinstance(values, tuple) else (values,)
    return values[0]


def images(rows=4, channels=3, size=8):
    return {"image": torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(0))}


def tokens():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"ids": torch.randint(30, (4, 12), generator=generator), "mask": mask}


def transformer():
    return Transformer(input_shape=(12,), vocabulary_size=30, num_outputs=3, width=16, num_layers=4, dropout=0.0)


def residual():
    return CifarResNet(input_shape=(3, 8, 8), num_outputs=4, num_blocks=2, widths=(4, 8))


@pytest.mark.parametrize(("make", "inputs"), [(transformer, tokens()), (residual, images())])
@pytest.mark.parametrize("number", [2, 4])
def test_stages_are_the_modules_of_the_model_by_their_names_and_do_what_it_does(make, inputs, number):
    model = make()
    stages, _ = stages_of(model, inputs, number)
    held = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    for stage in stages:
        assert all(model.get_parameter(name) is parameter for name, parameter in stage.named_parameters())
        assert any(True for _ in stage.parameters())
    with torch.no_grad():
        assert torch.equal(outputs_of(stages, inputs), forward(model, inputs))


def test_leaves_the_model_and_the_generators_alone():
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    planned(model, images(), 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Shortcut(nn.Module):
    """Uses what the first layer gives again in the last."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, rows):
        first = self.layers[0](rows)
        length = first.shape[0]
        values = first
        for layer in self.layers[1:-1]:
            values = layer(values)
        return self.layers[-1](values + first).view(length, -1)


def test_hands_on_what_a_later_stage_uses_and_knows_lengths_by_itself():
    inputs = {"rows": torch.randn(4, 8)}
    traced = Traced(Shortcut(), ["rows"])
    shapes = measured(traced, [*inputs.values()], repeats=0).given
    place = traced.names().index("layers_2")
    assert {node.name for node in traced.handed(place)} == {"layers_0", "layers_1", "getitem"}
    assert shapes["getitem"] == Plain(4)
    assert [each.shape for each in traced.taken(place, shapes)] == [(4, 8), (4, 8)]
    cut = Cut(opened=(), before=("layers_1", "layers_2", "layers_3"))
    assert torch.equal(outputs_of(traced.stages(cut, shapes), inputs), traced.model(**inputs))


def test_the_expensive_layers_are_shared_out_by_cost_and_not_by_number():
    small = [nn.Linear(8, 8) for _ in range(5)]
    wide = nn.Sequential(*small, nn.Linear(8, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    _, plan = stages_of(wide, {"rows": torch.randn(256, 8)}, 2)
    assert plan.cut.before == ("_7",)


class Unequal(nn.Module):
    """Nearly everything is inside of one child."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.all = Shortcut()

    def forward(self, rows):
        return self.all(self.first(rows))


def test_looks_into_a_block_that_has_nearly_everything():
    stages, plan = stages_of(Unequal(), {"rows": torch.randn(4, 8)}, 4)
    assert plan.cut.opened == ("all",)
    assert all(stage.state_dict() for stage in stages)


def test_takes_a_cut_that_fits_and_makes_another_where_it_does_not():
    model, inputs = Shortcut(), {"rows": torch.randn(4, 8)}
    kept = Cut(opened=(), before=("layers_3",))
    assert planned(model, inputs, 2, cut=kept).cut == kept
    assert len(planned(model, inputs, 3, cut=kept).cut.before) == 2
    assert planned(model, inputs, 2, cut=Cut(opened=(), before=("other",))).cut.before != ("other",)
    parts = TensorPlan(layers={"layers.2": "column", "layers.3": "row"})
    assert planned(model, inputs, 2, cut=kept, plan=parts).cut.before not in {("add",), ("layers_3",)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return functional.linear(self.layer(self.words(ids)), self.words.weight)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, rows):
        return self.one(rows) if rows.sum() > 0 else self.other(rows)


class Drawing(nn.Module):
    """Draws from a generator that tracing does not see."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, rows):
        return self.other(self.one(rows)) * random.random()


ROWS = {"rows": torch.ones(4, 8)}


@pytest.mark.parametrize(
    ("model", "inputs", "problem"),
    [
        (nn.Linear(8, 2), ROWS, r"^it can be cut into 1 stages at most, and the pipeline needs 2$"),
        (Tied(), {"ids": torch.ones(4, dtype=torch.int64)}, r"1 stages at most.*: words\.weight can't be in several$"),
        (Branching(), ROWS, r"^it can't be cut into the stages of a pipeline: symbolically traced"),
        (Drawing(), ROWS, r"one after the other they give other outputs than it$"),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 2)), ROWS, r"mat1 and mat2"),
    ],
)
def test_says_why_a_model_can_not_be_cut(model, inputs, problem):
    with pytest.raises(PassError, match=problem) as refused:
        planned(model, inputs, 2, what="it")
    assert "\n" not in str(refused.value)


def test_layers_that_have_parts_of_a_tensor_stay_together():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 8), nn.Linear(8, 8))
    plan = TensorPlan(layers={"1": "column", "3": "row"})
    traced = Traced(model, ["rows"])
    shapes = measured(traced, [torch.ones(4, 8)], repeats=0).given
    assert [moved is not None for moved in traced.moved_bytes(shapes, plan)] == [False, True, False, False, True]


def test_knows_a_stage_that_writes_over_what_it_takes():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    kept = Cut(opened=(), before=("_1",))
    assert planned(model, {"rows": torch.randn(4, 8)}, 2, cut=kept).overwrites == [False, True]
