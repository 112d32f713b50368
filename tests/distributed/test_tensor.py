"""Plans by which layers are divided, and what is wrong with them."""

import re

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.core.sections import Distributed
from hasten.core.tensor_plan import TensorPlan
from hasten.distributed.group import Group
from hasten.distributed.sharded import sharded
from hasten.distributed.tensor import divide
from hasten.models.transformer import Transformer


def model():
    return Transformer(input_shape=(8,), vocabulary_size=21, num_outputs=4, width=12, num_heads=3, num_layers=2)


def tied():
    made = model()
    made.layers[1].linear1.weight = made.layers[0].linear1.weight
    return made


def quantized():
    made = model()
    nn.utils.parametrize.register_parametrization(made.layers[0].linear1, "weight", nn.Identity())
    return made


def group(**knobs):
    return Group(spread=Distributed(kind="tensor", devices=2, tensor=0, **knobs), rank=0, size=2)


@pytest.mark.parametrize(
    ("make", "layers", "problem"),
    [
        (model, {}, "distributed.tensor=2 divides the layers that model.tensor_plan names, and it names none"),
        (model, {"layers.*.linear3": "row"}, "the model has no module 'layers.*.linear3', did you mean"),
        (model, {"linear1": "column"}, "the model has no module 'linear1'"),
        (model, {"layers.*.normalization1": "column"}, "layers.0.normalization1 is a LayerNorm, and column divides a"),
        (model, {"tokens": "embedding"}, "tokens can't be divided among distributed.tensor=2: its num_embeddings are"),
        (model, {"layers.*.attention.query": "column"}, "query can't be divided among distributed.tensor=2: it has 3"),
        (tied, {"layers.0.linear1": "column"}, "layers.0.linear1 can't be divided among distributed.tensor=2: it shar"),
        (quantized, {"layers.0.linear1": "column"}, "weights are made of others while it trains: distributed=fsdp can"),
    ],
)
def test_refuses_what_can_not_be_divided(make, layers, problem):
    with pytest.raises(HastenError, match=re.escape(problem)) as refused:
        divide(make(), TensorPlan(layers=layers), group(), {})
    assert "\n" not in str(refused.value)


def test_refuses_a_plan_without_a_sequence():
    plan = TensorPlan(layers={"layers.*.linear1": "column", "layers.*.linear2": "row"})
    with pytest.raises(HastenError, match=r"distributed\.sequence_parallel=true divides along the sequence"):
        divide(model(), plan, group(sequence_parallel=True), {})


def test_refuses_to_divide_a_scalar():
    made = nn.Linear(2, 2)
    made.scale = nn.Parameter(torch.ones(()))
    spread = Distributed(kind="fsdp", devices=2, shards=0)
    with pytest.raises(HastenError, match=r"distributed=fsdp can't divide scale, .* distributed=ddp keeps all whole"):
        sharded(made, Group(spread=spread, rank=0, size=2))


def test_null_takes_a_layer_out_of_a_plan():
    config = {"model": {"arch": {}, "tensor_plan": {"a": "row", "b": None}}, "student": {"arch": None}, "pruning": {}}
    for section in ("model", "pruning"):
        assert TensorPlan.of(config, section) == TensorPlan(layers={"a": "row"})
