"""Weights that are exactly zero, the right ones, and that stay so through a fine-tuning."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.artefacts import module as artefact
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Input, Rows
from hasten.passes.pruning.unstructured import UnstructuredPruning


class Bench:
    """Rows of noise, and a fine-tuning with AdamW on a copy."""

    seed = 0

    def __init__(self, *shape, steps=5):
        inputs = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
        self.train = Rows(inputs={"input": inputs}, targets=np.arange(32) % 2)
        self.steps, self.fitted = steps, []

    def fit(self, model):
        student = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(self.steps):
            optimizer.zero_grad()
            outputs = student(*(torch.from_numpy(values) for values in self.train.inputs.values()))
            nn.functional.cross_entropy(outputs, torch.from_numpy(self.train.targets)).backward()
            optimizer.step()
            student.load_state_dict(copy.deepcopy(student.state_dict()))  # as one that was interrupted does
        self.fitted.append(student)
        return student.eval()


def two_layers():
    """Rows of norms 5, 1 and 13, and of norms 0.5 and 10; two outputs that stay whole."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.6, 0.8], [-5.0, 12.0]]))
        model[1].weight.copy_(torch.tensor([[0.3, 0.4, 0.0], [-6.0, 8.0, 0.1]]))
        model[2].weight.fill_(0.01)
    return model


def zeros(model):
    return [(layer.weight == 0).tolist() for layer in model]


@pytest.mark.parametrize(
    ("knobs", "first", "second"),
    [
        # |w|: 3 4 | 0.6 0.8 | 5 12 and 0.3 0.4 0 | 6 8 0.1
        ({"sparsity": 0.5, "scope": "layer"}, [[1, 0], [1, 1], [0, 0]], [[1, 0, 1], [0, 0, 1]]),
        ({"sparsity": 0.5, "scope": "global"}, [[0, 0], [1, 1], [0, 0]], [[1, 1, 1], [0, 0, 1]]),
        ({"sparsity": 0.25, "scope": "global"}, [[0, 0], [0, 0], [0, 0]], [[1, 0, 1], [0, 0, 1]]),
        ({"threshold": 0.6}, [[0, 0], [0, 0], [0, 0]], [[1, 1, 1], [0, 0, 1]]),
        ({"threshold": 4.5}, [[1, 1], [1, 1], [0, 0]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_drops_the_weights_of_the_least_size(knobs, first, second):
    model = two_layers()
    pruned = UnstructuredPruning(**{"sparsity": None, **knobs})(model, Bench(2, steps=0)).model
    assert zeros(pruned) == [np.array(first, bool).tolist(), np.array(second, bool).tolist(), [[False] * 2] * 2]
    for before, after in zip(model, pruned, strict=True):
        kept = after.weight != 0
        assert torch.equal(after.weight[kept], before.weight[kept])
        assert torch.equal(after.bias, before.bias)


@pytest.mark.parametrize(
    ("knobs", "first", "second"),
    [
        ({"sparsity": 0.5, "scope": "layer"}, [0, 1, 0], [1, 0]),  # one row of three is the most that half of them is
        ({"sparsity": 0.7, "scope": "layer"}, [1, 1, 0], [1, 0]),
        ({"sparsity": 0.5, "scope": "global"}, [0, 1, 0], [1, 0]),  # 3 + 2 of 12 weights; the next row has 2 more
        ({"sparsity": 0.6, "scope": "global"}, [1, 1, 0], [1, 0]),
        ({"threshold": 0.75}, [0, 0, 0], [1, 0]),
        ({"threshold": 6.0}, [1, 1, 0], [1, 0]),
    ],
)
def test_drops_the_filters_of_the_least_norm(knobs, first, second):
    method = UnstructuredPruning(**{"sparsity": None, "importance": "filter", **knobs})
    pruned = method(two_layers(), Bench(2, steps=0)).model
    dropped = [(layer.weight == 0).all(1).tolist() for layer in pruned]
    assert dropped == [np.array(first, bool).tolist(), np.array(second, bool).tolist(), [False, False]]


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.6), st.sampled_from(["layer", "global"]))
def test_holds_the_share_and_keeps_nothing_that_is_less_than_what_went(sparsity, scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    pruned = UnstructuredPruning(sparsity=sparsity, scope=scope)(model, Bench(6, steps=0)).model
    pairs = [(model[place].weight.detach().abs(), pruned[place].weight == 0) for place in (0, 2)]
    if scope == "global":
        pairs = [(torch.cat([size.flatten() for size, _ in pairs]), torch.cat([zero.flatten() for _, zero in pairs]))]
    for size, zero in pairs:
        assert int(zero.sum()) == round(sparsity * size.numel())
        assert size[zero].max() <= size[~zero].min()


@pytest.mark.parametrize("importance", ["magnitude", "filter"])
def test_what_went_is_exactly_zero_after_the_fine_tuning_and_the_rest_has_learnt(importance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    bench = Bench(1, 8, 8)
    surgery = UnstructuredPruning(sparsity=0.5, importance=importance)(model, bench)
    weight = surgery.model[0].weight.detach()
    assert int((weight == 0).sum()) == 36
    assert not torch.signbit(weight[weight == 0]).any()  # a negative zero is another byte
    assert not torch.equal(weight[weight != 0], model[0].weight[weight != 0])
    (step,) = surgery.steps
    assert (step["technique"], step["sparsity"], step["resized"]) == ("unstructured pruning", {"0.weight": 0.5}, {})
    assert [name for name, _ in surgery.model.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not list(surgery.model.named_buffers())[3:]
    assert not surgery.model.training


def test_fine_tunes_as_if_what_went_had_never_been_there():
    """Against a network in which the dropped inputs are cut from the layer's rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[0].weight[:, [1, 3]] *= 1e-3
    narrow = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), copy.deepcopy(model[2]))
    with torch.no_grad():
        narrow[0].weight.copy_(model[0].weight[:, [0, 2]])
    bench, other = Bench(4, steps=20), Bench(2, steps=20)
    other.train.inputs["input"] = bench.train.inputs["input"][:, [0, 2]].copy()
    pruned = UnstructuredPruning(sparsity=0.5, scope="layer")(model, bench).model
    torch.testing.assert_close(pruned[0].weight[:, [0, 2]], other.fit(narrow)[0].weight)


def test_the_statistics_are_those_of_what_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    bench = Bench(3, steps=0)
    pruned = UnstructuredPruning()(model, bench).model
    with torch.no_grad():
        features = pruned[0](torch.from_numpy(bench.train.inputs["input"]))
    torch.testing.assert_close(pruned[1].running_mean, features.mean(0))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.position = nn.Parameter(torch.full((1, 4, 8), 1e-6))
        self.normalization = nn.LayerNorm((4, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.memory = nn.GRU(8, 6, batch_first=True)
        self.grow = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.tied = nn.Linear(8, 7, bias=False)
        self.tied.weight = self.table.weight
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        hidden = self.normalization(self.table(ids) + self.position)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.grow(self.memory(hidden)[0].transpose(1, 2)).mean(2))


def everything():
    torch.manual_seed(0)
    bench = Bench(4)
    bench.train.inputs["input"] = np.random.default_rng(0).integers(0, 7, (32, 4))
    return Everything().eval(), bench


@pytest.mark.parametrize("importance", ["magnitude", "filter"])
def test_takes_weights_of_every_kind_and_leaves_biases_norms_and_bare_parameters(importance):
    model, bench = everything()
    surgery = UnstructuredPruning(scope="layer", importance=importance)(model, bench)
    assert list(surgery.steps[0]["sparsity"]) == [
        "table.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_ih_l0",
        "memory.weight_hh_l0",
        "grow.weight",
    ]
    assert all(0.4 < share <= 0.5 for share in surgery.steps[0]["sparsity"].values())
    zero = {name: (values == 0).any().item() for name, values in surgery.model.named_parameters()}
    assert [name for name, any_zero in zero.items() if any_zero] == list(surgery.steps[0]["sparsity"])
    assert surgery.model.tied.weight is surgery.model.table.weight


def test_filters_of_a_transposed_convolution_are_its_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(36, 3)).eval()
    with torch.no_grad():
        model[0].weight[:2, 1] = 1e-3  # output 1, of the first group
        model[0].weight[2:, 0] = 1e-3  # output 3, the first of the second group
        model[0].weight[:2, 2] = 1e-3  # output 2
    pruned = UnstructuredPruning(importance="filter")(model, Bench(4, 4, steps=0)).model
    outputs = pruned[0](torch.ones(1, 4, 4))
    assert (outputs == 0).all(2).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize(
    ("keep", "whole"),
    [((), []), (("first",), ["0"]), (("last",), ["2"]), (("first", "last"), ["0", "2"])],
)
def test_keeps_the_ends_that_it_is_told_to_keep(keep, whole):
    method = UnstructuredPruning(scope="layer", keep=keep)
    shares = method(two_layers(), Bench(2, steps=0)).steps[0]["sparsity"]
    assert list(shares) == [f"{name}.weight" for name in "012" if name not in whole]


RESNET = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}


@pytest.mark.parametrize("importance", ["magnitude", "filter"])
def test_is_rebuilt_bit_for_bit(tmp_path, importance):
    model, arch = artefact.build(RESNET, [Input(shape=(1, 8, 8))], (3,), seed=0)
    bench = Bench(1, 8, 8)
    surgery = UnstructuredPruning(importance=importance)(model, bench)
    artefact.save(tmp_path, arch, surgery.model, json.loads(json.dumps(surgery.steps)))
    x = torch.from_numpy(bench.train.inputs["input"])
    rebuilt = artefact.rebuild(tmp_path)
    assert torch.equal(rebuilt(x), surgery.model(x))
    shares = surgery.steps[0]["sparsity"]
    weights = dict(rebuilt.named_parameters())
    assert {name: float((weights[name] == 0).float().mean()) for name in shares} == pytest.approx(shares)
    assert artefact.surgery(tmp_path)[0]["technique"] == "unstructured pruning"


def test_leaves_its_input_alone_and_gives_the_same_again():
    model, bench = everything()
    before = copy.deepcopy(model.state_dict())
    one, two = (UnstructuredPruning()(model, bench).model.state_dict() for _ in range(2))
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_frozen_weights_stay_frozen():
    model = two_layers()
    model[0].weight.requires_grad_(False)
    pruned = UnstructuredPruning()(model, Bench(2)).model
    assert [name for name, values in pruned.named_parameters() if not values.requires_grad] == ["0.weight"]


@pytest.mark.parametrize(("sparsity", "threshold"), [(0.5, 0.1), (None, None)])
def test_wants_a_share_or_a_threshold(sparsity, threshold):
    with pytest.raises(ConfigError, match=r"give pruning\.sparsity or pruning\.threshold and set the other"):
        UnstructuredPruning(sparsity=sparsity, threshold=threshold)


def test_refuses_what_leaves_nothing_or_everything():
    with pytest.raises(PassError, match=r"no weight would be set to zero: raise pruning\.threshold \(now 1e-05\)"):
        UnstructuredPruning(sparsity=None, threshold=1e-5, keep=("last",))(nn.Sequential(*two_layers()[::2]), Bench(2))
    with pytest.raises(PassError, match=r"nothing of 1\.weight would be left: lower pruning\.threshold \(now 11\)"):
        UnstructuredPruning(sparsity=None, threshold=11)(two_layers(), Bench(2))
    with pytest.raises(PassError, match=r"nothing of 0\.weight, 1\.weight would be left: lower pruning\.sparsity"):
        UnstructuredPruning(sparsity=0.9999)(two_layers(), Bench(2))


def test_refuses_a_model_whose_every_layer_is_kept():
    with pytest.raises(PassError, match=r"Linear has no layer to prune: .*pruning\.keep=\['last'\] leaves"):
        UnstructuredPruning()(nn.Linear(2, 3), Bench(2))


def test_relieves_capacity_alone():
    assert UnstructuredPruning.relieves == ("capacity",)
