"""Channels that are really gone, and a model that still computes what it should."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hasten.artefacts import module as artefact
from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import PassError
from hasten.core.interfaces import Input, Rows
from hasten.passes.pruning.groups import Group
from hasten.passes.pruning.structured import StructuredPruning


class Bench:
    """Rows of noise, and a fine-tuning that leaves the model as it is."""

    seed = 0

    def __init__(self, *shape, rows=64):
        inputs = np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)
        self.train = Rows(inputs={"input": inputs}, targets=np.zeros(rows, dtype=np.int64))
        self.fitted = []

    def fit(self, model):
        self.fitted.append(model)
        return model.eval()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RESNET = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 2}
MLP = {"_target_": "hasten.models.mlp.MLP", "hidden": [24, 16]}


def built(arch, shape, num_classes=3):
    return artefact.build(arch, [Input(shape=shape)], (num_classes,), seed=0)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops()


def resnet_parameters(widths, num_classes=3):
    first, second = widths
    stem = first * 9 + 2 * first
    narrow = 2 * (2 * first * first * 9 + 4 * first)
    change = (first * second + second * second) * 9 + 4 * second + first * second + 2 * second
    wide = 2 * second * second * 9 + 4 * second
    return stem + narrow + change + wide + second * num_classes + num_classes


def resnet_flops(widths, num_classes=3):
    first, second = widths
    stem = 64 * first * 9
    narrow = 2 * 2 * 64 * first * first * 9
    change = 16 * (first * second * 9 + second * second * 9 + first * second)
    wide = 2 * 16 * second * second * 9
    return 2 * (stem + narrow + change + wide + second * num_classes)


@pytest.mark.parametrize(("sparsity", "widths"), [(0.5, (4, 8)), (0.25, (8, 12)), (0.75, (4, 4))])
def test_a_residual_network_is_as_small_as_the_narrower_one(sparsity, widths):
    # 25 % of 8 leaves 6, which lies between two multiples of 4; the even multiple, 8, is taken.
    model, _ = built(RESNET, (1, 8, 8))
    assert (num_parameters(model), flops(model, (1, 8, 8))) == (resnet_parameters((8, 16)), resnet_flops((8, 16)))
    pruned = StructuredPruning(sparsity=sparsity)(model, Bench(1, 8, 8)).model
    assert (num_parameters(pruned), flops(pruned, (1, 8, 8))) == (resnet_parameters(widths), resnet_flops(widths))
    assert pruned.blocks[0].convolution1.out_channels == widths[0]
    assert pruned.blocks[3].normalization2.num_features == widths[1]


@pytest.mark.parametrize(("sparsity", "round_to", "hidden"), [(0.5, 4, (12, 8)), (0.5, 1, (12, 8)), (0.9, 1, (2, 2))])
def test_a_fully_connected_network_keeps_inputs_and_outputs(sparsity, round_to, hidden):
    model, _ = built(MLP, (5,))
    pruned = StructuredPruning(sparsity=sparsity, round_to=round_to)(model, Bench(5)).model
    shapes = [tuple(layer.weight.shape) for layer in pruned.layers if isinstance(layer, nn.Linear)]
    assert shapes == [(hidden[0], 5), (hidden[1], hidden[0]), (3, hidden[1])]


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_removes_the_channels_that_do_nothing_and_changes_no_output(importance):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 6),
        nn.Linear(6, 3),
    ).eval()
    idle = {"0": [1, 2, 5, 7], "2": [0, 3, 4, 8, 10, 11], "5": [0, 2, 5]}
    with torch.no_grad():
        for name, channels in idle.items():
            model.get_submodule(name).weight[channels] = 0
            model.get_submodule(name).bias[channels] = 0
    bench = Bench(2, 8, 8)
    surgery = StructuredPruning(sparsity=0.5, round_to=1, importance=importance)(model, bench)
    x = torch.from_numpy(bench.train.inputs["input"])
    assert surgery.steps[0]["removed"] == idle
    torch.testing.assert_close(surgery.model(x), model(x), rtol=1e-5, atol=1e-6)


def test_importance_is_the_norm_that_was_asked_for():
    # The channels have the weights (3, 0) and (2, 2) on their way in: l1 says 3 < 4, l2 says 9 > 8.
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [2.0, 2.0]]))
        model[1].weight.fill_(1.0)
    removed = {
        norm: StructuredPruning(round_to=1, importance=norm)(model, Bench(2)).steps[0]["removed"]
        for norm in ("l1", "l2")
    }
    assert removed == {"l1": {"0": [0]}, "l2": {"0": [1]}}


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, group normalization, a concatenation, a bare parameter and a frozen one."""

    def __init__(self, num_classes):
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=2)
        self.normalization = nn.GroupNorm(4, 24)
        self.side = nn.Conv2d(3, 12, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1, 12, 1, 1))
        self.head = nn.Linear(36, num_classes)
        self.side.bias.requires_grad_(False)

    def forward(self, x):
        main = self.normalization(self.grouped(self.depthwise(self.wide(x)).relu())).relu()
        return self.head(torch.cat([main, self.side(x) * self.scale], dim=1).mean((2, 3)))


def test_follows_groups_concatenations_and_bare_parameters():
    torch.manual_seed(0)
    model = Mixed(5)
    pruned = StructuredPruning(sparsity=0.5, round_to=2)(model, Bench(3, 6, 6)).model
    assert (pruned.wide.out_channels, pruned.depthwise.groups, pruned.depthwise.out_channels) == (8, 8, 8)
    assert (pruned.grouped.in_channels, pruned.grouped.out_channels, pruned.grouped.groups) == (8, 12, 2)
    assert (pruned.normalization.num_channels, pruned.side.out_channels) == (12, 6)
    assert (tuple(pruned.scale.shape), tuple(pruned.head.weight.shape)) == ((1, 6, 1, 1), (5, 18))
    assert [name for name, p in pruned.named_parameters() if not p.requires_grad] == ["side.bias"]


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(16 * 16, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.hidden(torch.cat([self.one(x), self.two(x)], dim=1).flatten(1)).relu())


def test_leaves_a_concatenation_whole_whose_pixels_are_flattened():
    pruned = StructuredPruning()(Flattened(), Bench(1, 4, 4)).model
    assert (pruned.one.out_channels, pruned.two.out_channels, pruned.hidden.out_features) == (8, 8, 4)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 12, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(12, 1, 1))
        self.hidden, self.head = nn.Linear(20, 8), nn.Linear(8, 2)

    def forward(self, x):
        features = torch.cat([self.one(x), self.two(x) * self.scale], dim=1).mean((2, 3))
        return self.head(self.hidden(features).relu())


def test_leaves_a_concatenation_whole_that_a_bare_parameter_leads_to():
    pruned = StructuredPruning()(Scaled(), Bench(1, 4, 4)).model
    assert (pruned.one.out_channels, pruned.two.out_channels, pruned.hidden.out_features) == (8, 12, 4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head((h + self.down(self.up(h).relu())).mean(1))


def test_leaves_the_width_of_attention_whole_and_prunes_what_lies_between():
    pruned = StructuredPruning()(Attention(), Bench(5, 6)).model
    assert (pruned.embed.out_features, pruned.attention.embed_dim, pruned.up.out_features) == (16, 16, 16)


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_prunes_the_hidden_units_of_a_transformer_and_neither_its_width_nor_its_heads(reader, many_texts, importance):
    model, bench = artefact.rebuild(reader.module), Bench(1)
    bench.train = Rows(inputs=many_texts, targets=np.zeros(64, dtype=np.int64))
    surgery = StructuredPruning(importance=importance)(model, bench)
    changed = {name: change["tensors"] for name, change in surgery.steps[0]["resized"].items()}
    assert changed == {"up": {"weight": [16, 16], "bias": [16]}, "down": {"weight": [16, 16]}}


@pytest.mark.parametrize(("arch", "shape"), [(RESNET, (1, 8, 8)), (MLP, (20,))], ids=["resnet", "mlp"])
def test_what_is_pruned_twice_is_rebuilt_bit_for_bit_and_trains_on(tmp_path, arch, shape):
    model, filled = built(arch, shape)
    bench, folder = Bench(*shape), tmp_path / "0"
    folder.mkdir()
    artefact.save(folder, filled, model)
    for number, sparsity in enumerate([0.5, 0.4], start=1):
        surgery = StructuredPruning(sparsity=sparsity, round_to=2)(artefact.rebuild(folder), bench)
        steps = [*artefact.surgery(folder), *json.loads(json.dumps(surgery.steps))]
        folder = tmp_path / str(number)
        folder.mkdir()
        artefact.save(folder, filled, surgery.model, steps)
    rebuilt = artefact.rebuild(folder)
    x = torch.from_numpy(bench.train.inputs["input"])
    assert len(artefact.surgery(folder)) == 2
    assert num_parameters(rebuilt) < 0.3 * num_parameters(model)
    assert torch.equal(rebuilt(x), surgery.model(x))
    losses = [trained_one_step(side, x) for side in (rebuilt, surgery.model)]
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


def trained_one_step(model, x):
    labels = torch.arange(len(x)) % 3
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.05), []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_leaves_its_input_and_the_process_alone():
    model, _ = built(RESNET, (1, 8, 8))
    model.train()
    before, state = copy.deepcopy(model), (random.getstate(), torch.get_rng_state(), torch.is_grad_enabled())
    with torch.no_grad():
        StructuredPruning()(model, Bench(1, 8, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())
    assert state[2] == torch.is_grad_enabled()


def test_gives_the_same_model_again():
    model, _ = built(RESNET, (1, 8, 8))
    one, two = (StructuredPruning()(model, Bench(1, 8, 8)) for _ in range(2))
    assert one.steps == two.steps
    pairs = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_fine_tunes_the_pruned_model():
    model, _ = built(MLP, (5,))
    bench = Bench(5)
    surgery = StructuredPruning()(model, bench)
    assert bench.fitted == [surgery.model]
    assert num_parameters(bench.fitted[0]) < num_parameters(model)


def test_statistics_become_those_of_the_rows():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9))
    inputs = np.random.default_rng(0).normal(5, 2, size=(300, 3)).astype(np.float32)
    with torch.no_grad():
        features = model[0](torch.from_numpy(inputs)).numpy()
    estimate_statistics(model, {"input": inputs}, batch_size=60)
    batches = features.reshape(5, 60, 4)
    np.testing.assert_allclose(model[1].running_mean, features.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model[1].running_var, batches.var(1, ddof=1).mean(0), rtol=1e-4)
    assert (model[1].momentum, model.training, model[1].training) == (0.1, False, False)


def test_statistics_are_those_of_the_fine_tuned_model():
    class Shifting(Bench):
        def fit(self, model):
            with torch.no_grad():
                model[0].bias += 100
            return super().fit(model)

    model, bench = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), Shifting(3)
    pruned = StructuredPruning()(model, bench).model
    with torch.no_grad():
        normal = pruned[1](pruned[0](torch.from_numpy(bench.train.inputs["input"])))
    torch.testing.assert_close(normal.mean(0), torch.zeros(4), atol=1e-3, rtol=0)


def test_a_model_without_batch_normalization_needs_no_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9))
    estimate_statistics(model, {"input": np.zeros((4, 3), dtype=np.float32)})
    assert not model.training


def test_refuses_a_model_whose_every_layer_feeds_the_output():
    with pytest.raises(PassError, match=r"no layer has channels to remove: all its .* feed the output"):
        StructuredPruning()(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), Bench(4))


def test_refuses_where_rounding_leaves_nothing_to_remove():
    model, _ = built({**MLP, "hidden": [4, 3]}, (5,))
    with pytest.raises(PassError, match=r"pruning\.sparsity=0\.5 and pruning\.round_to=4, layers of \[3, 4\] channels"):
        StructuredPruning()(model, Bench(5))


class Rigid(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.hidden(x) * torch.ones(8))


def test_refuses_a_model_that_insists_on_its_width():
    with pytest.raises(PassError, match="Rigid does not run with fewer channels"):
        StructuredPruning()(Rigid(), Bench(4))


def test_keeps_no_fewer_than_one_multiple():
    model, _ = built({**MLP, "hidden": [64, 6]}, (5,))
    pruned = StructuredPruning(sparsity=0.99, round_to=4)(model, Bench(5)).model
    assert [layer.out_features for layer in pruned.layers if isinstance(layer, nn.Linear)] == [4, 4, 3]


@pytest.mark.parametrize(("share", "kept"), [(1.0, 10), (0.95, 10), (0.85, 8), (0.62, 8), (0.58, 4), (0.0, 4)])
def test_all_units_are_a_width_whatever_they_are_a_multiple_of(share, kept):
    group = Group(name="", kind="channels", num_units=10, multiple=4, slices=(), channels=torch.arange(10)[:, None])
    assert group.nearest(share) == kept


def test_keeps_the_nearest_multiple():
    for sparsity in (0.1, 0.3, 0.5, 0.7):
        model, _ = built({**MLP, "hidden": [40]}, (5,))
        kept = StructuredPruning(sparsity=sparsity, round_to=8)(model, Bench(5)).model.layers[1].out_features
        assert kept % 8 == 0
        assert math.isclose(kept, 40 * (1 - sparsity), abs_tol=4.001)
