"""Weights that are exactly zero, the right ones, and that stay so through a fine-tuning."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.artefacts import module as artefact
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Input, Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.passes.pruning.unstructured import UnstructuredPruning
from hasten.tasks.classification import Classification
from hasten.training.fit import fit


class Bench:
    """Rows of noise, and a fine-tuning with AdamW on a copy."""

    seed = 0
    task = Classification()

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


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-2, 2, width=32, allow_subnormal=False), min_size=6, max_size=6),
    st.floats(0.0625, 1.875, width=32),
)
def test_is_zero_where_the_importance_is_less_than_theta_and_as_it_was_elsewhere(weights, theta):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weights).view(3, 2))
        model[0].weight[0, 0], model[0].weight[0, 1] = theta / 2, 3.0  # something goes and something stays
    before = model[0].weight.detach().clone()
    surgery = UnstructuredPruning(sparsity=None, threshold=theta)(model, Bench(2, steps=0))
    expected = [[w if abs(w) >= theta else 0.0 for w in row] for row in before.tolist()]
    assert surgery.model[0].weight.tolist() == expected
    assert surgery.steps[0]["thresholds"] == {"0.weight": before.abs()[before.abs() >= theta].min()}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_says_which_theta_the_share_came_to(scope):
    model = two_layers()
    surgery = UnstructuredPruning(scope=scope)(model, Bench(2, steps=0))
    thetas = surgery.steps[0]["thresholds"]
    # |w|: 3 4 0.6 0.8 5 12 and 0.3 0.4 0 6 8 0.1, of which half stay
    assert thetas == pytest.approx({"layer": {"0.weight": 4, "1.weight": 0.4}}.get(scope, dict.fromkeys(thetas, 3)))
    for name, theta in thetas.items():
        before, after = (each.get_parameter(name) for each in (model, surgery.model))
        assert torch.equal(after == 0, before.abs() < theta)


class Sum:
    """A task whose loss is the sum of the outputs, so that a weight's gradient is the mean of its input."""

    def loss(self, outputs, targets):
        return outputs.sum(1).mean()


def one_layer(weights):
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    return model


def of_inputs(rows):
    bench = Bench(len(rows[0]), steps=0)
    bench.task, bench.train = Sum(), Rows(inputs={"input": np.float32(rows)}, targets=np.zeros(len(rows), np.int64))
    return bench


@pytest.mark.parametrize(("importance", "zero"), [("magnitude", [0, 1, 1, 0]), ("taylor", [1, 0, 0, 1])])
def test_taylor_counts_what_the_loss_would_change_by(importance, zero):
    """By hand: |w| is 3, 1, 0.5, 2; times the mean of its input, which is 0.1, 2, 1, 0, it is 0.3, 2, 0.5, 0."""
    bench = of_inputs([[0.2, 1.0, 1.0, 5.0], [0.0, 3.0, 1.0, -5.0]])
    surgery = UnstructuredPruning(importance=importance, keep=())(one_layer([3.0, -1.0, 0.5, 2.0]), bench)
    assert (surgery.model[0].weight == 0).tolist() == [list(map(bool, zero))]
    assert surgery.steps[0]["thresholds"]["0.weight"] == pytest.approx({"magnitude": 2, "taylor": 0.5}[importance])


def test_taylor_averages_over_batches_whose_gradients_cancel():
    """As where a training has ended: over all rows the first input's gradient is 0, in each batch of 64 it is 1."""
    bench = of_inputs([[1.0, 0.5]] * 64 + [[-1.0, 0.5]] * 64)
    surgery = UnstructuredPruning(importance="taylor", keep=())(one_layer([1.0, 1.0]), bench)
    assert (surgery.model[0].weight == 0).tolist() == [[False, True]]


def test_the_random_control_repeats_itself_and_differs_by_seed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    masks = []
    for seed in (0, 0, 1):
        bench = Bench(6, steps=0)
        bench.seed = seed
        masks.append(UnstructuredPruning(importance="random")(model, bench).model[0].weight == 0)
    assert torch.equal(masks[0], masks[1])
    assert [int(mask.sum()) for mask in masks] == [120] * 3
    # Chosen independently, half of what one drops is dropped by the other.
    assert 0.3 < (masks[0] & masks[2]).sum() / 120 < 0.7


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random", "filter"])
def test_goes_by_the_cubic_schedule_and_what_went_never_comes_back(importance):
    """By hand: 0.8 (1 - (1 - t / 4)^3) is 0.4625, 0.7, 0.7875 and 0.8; of 80 rows of 10 weights, 37, 56, 63 and 64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 80), nn.ReLU(), nn.Linear(80, 2)).eval()
    bench = Bench(10)
    surgery = UnstructuredPruning(sparsity=0.8, rounds=4, importance=importance)(model, bench)
    zero = [each.model[0].weight == 0 for each in bench.fitted]
    assert [int(each.sum()) for each in zero] == [370, 560, 630, 640]
    assert all((after | ~before).all() for before, after in itertools.pairwise(zero))
    assert torch.equal(surgery.model[0].weight == 0, zero[-1])
    assert surgery.notes[0] == (
        "pruned and fine-tuned in 4 rounds, to 46, 70, 79, 80 % of the weights of the layers pruned"
    )


def test_what_went_stays_gone_where_no_importance_tells_weights_apart():
    """The loss does not depend on the first layer, so that its weights are all of importance zero, masked or not."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    bench = Bench(4, steps=0)
    UnstructuredPruning(importance="taylor", rounds=3)(model, bench)
    first, *_, last = (each.model[0].weight == 0 for each in bench.fitted)
    assert 0 < first.sum() < last.sum() == 12
    assert last[first].all()


class RealBench(Bench):
    """Fine-tunes as the stages do."""

    def __init__(self, folder, *shape):
        super().__init__(*shape)
        self.folder = folder

    def fit(self, model):
        how = TrainingSettings(epochs=2, batch_size=8, lr=0.05, weight_decay=0.1)
        number = len(self.fitted)
        self.fitted.append(
            fit(
                model,
                self.train,
                how,
                task=self.task,
                seed=self.seed,
                threads=1,
                folder=self.folder / str(number),
                checkpoint_seconds=1000,
                progress=Silent(),
                what="pruned model",
                key="pruning.training",
            ).model
        )
        return self.fitted[-1]


def test_the_real_training_leaves_what_went_at_zero_in_every_round(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 2)).eval()
    bench = RealBench(tmp_path, 6)
    pruned = UnstructuredPruning(sparsity=0.75, rounds=2, importance="taylor")(model, bench).model
    first, last = (each.model[0].weight == 0 for each in bench.fitted)
    assert [int(each.sum()) for each in (first, last)] == [79, 90]  # 0.75 (1 - 0.5^3) = 0.65625 and 0.75 of 120
    assert last[first].all()
    assert torch.equal(pruned[0].weight == 0, last)
    assert not torch.isclose(pruned[0].weight[~last], model[0].weight[~last], atol=1e-4).any()


def test_says_how_many_zeros_there_are_and_what_they_save():
    _, note = ("", *UnstructuredPruning()(two_layers(), Bench(2, steps=0)).notes)
    assert note == (
        "26 % of the 23 parameters are zero: that saves bytes where engine.compressed=true, none in the dense file, "
        "and no time"
    )


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


@pytest.mark.parametrize("importance", ["magnitude", "filter", "taylor", "random"])
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


def test_a_threshold_has_no_schedule():
    with pytest.raises(ConfigError, match=r"^pruning\.rounds=3 needs pruning\.sparsity, .*: set pruning\.rounds=1 to"):
        UnstructuredPruning(sparsity=None, threshold=0.1, rounds=3)


def test_tells_when_a_round_is_too_small_to_drop_anything():
    with pytest.raises(PassError, match=r"raise pruning\.sparsity \(now 0\.1\) or lower pruning\.rounds \(now 9\)"):
        UnstructuredPruning(sparsity=0.1, rounds=9)(two_layers(), Bench(2))


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
