"""How much a channel, a head or a hidden unit matters."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.errors import PassError
from hasten.core.interfaces import Rows
from hasten.passes.pruning.gradients import batch_gradients
from hasten.passes.pruning.groups import Ranked
from hasten.passes.pruning.importance import rank, unit_scores
from hasten.passes.pruning.structured import StructuredPruning
from hasten.passes.pruning.surgery import structure
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression


class Bench:
    """Rows, and a fine-tuning that leaves the model as it is."""

    seed = 0

    def __init__(self, inputs, targets, task):
        self.train, self.task = Rows(inputs={"input": inputs}, targets=targets), task

    def fit(self, model):
        return model.eval()


def noise(*shape, rows=32):
    inputs = np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)
    return Bench(inputs, np.arange(rows) % 3, Classification())


def groups(model, bench, round_to=1):
    example = {name: torch.from_numpy(values[:2]) for name, values in bench.train.inputs.items()}
    return structure(model, example, round_to=round_to, heads=True).groups


def squares(model):
    return {name: parameter.detach().square() for name, parameter in model.named_parameters()}


def two_units():
    """y = 2 a + b with the hidden units a = 3 x0 and b = 4 x1."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    model[1].weight.data = torch.tensor([[2.0, 1.0]])
    return model


def test_taylor_is_the_mean_over_batches_of_what_the_loss_changes_by():
    # Two rows are one batch. Loss: mean of y^2 with y = 6 x0 + 4 x1. With the rows (1, 0) and (0, 1): dL/dy = (6, 4),
    # hence dL/dW0 = [[12, 4 * 0 + 0], ...]: unit a gets |3 * 12| + |2 * 18| = 72, unit b |4 * 4| + |1 * 16| = 32.
    model, inputs = two_units(), np.eye(2, dtype=np.float32)
    bench = Bench(inputs, np.zeros((2, 1), dtype=np.float32), Regression())
    (ranked,) = rank(model, groups(model, bench), "taylor", bench)
    assert ranked.order.tolist() == [[1, 0]]
    assert ranked.weight == pytest.approx(72 + 32)
    np.testing.assert_allclose(ranked.kept_share, [1, 72 / 104, 0])


def test_taylor_does_not_let_batches_cancel_one_another():
    model = two_units()
    inputs = np.repeat(np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32), 64, axis=0)
    bench = Bench(inputs, np.repeat([[5.0], [-7.0]], 64, axis=0).astype(np.float32), Regression())
    gradients = [each["0.weight"][0, 0].item() for _, each in batch_gradients(model, bench.train, bench.task)]
    (ranked,) = rank(model, groups(model, bench), "taylor", bench)
    assert np.sign(gradients).tolist() == [1, -1]
    assert ranked.order.tolist() == [[1, 0]]
    assert ranked.weight > 0


def test_taylor_keeps_what_the_loss_needs_where_magnitude_does_not():
    # Unit b is larger, but its input is always 0.
    inputs = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32) * np.array([1, 0], dtype=np.float32)
    bench, model = Bench(inputs, np.zeros((32, 1), dtype=np.float32), Regression()), two_units()
    model[1].weight.data = torch.tensor([[1.0, 1.0]])
    removed = {
        importance: StructuredPruning(round_to=1, importance=importance)(model, bench).steps[0]["removed"]
        for importance in ("l2", "taylor")
    }
    assert removed == {"l2": {"0": [0]}, "taylor": {"0": [1]}}


def test_bn_scale_is_the_absolute_value_of_gamma():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.1, 1.4])
    bench = noise(3)
    (ranked,) = rank(model, groups(model, bench), "bn_scale", bench)
    assert ranked.order.tolist() == [[2, 0, 3, 1]]
    np.testing.assert_allclose(ranked.kept_share, [1, 3.9 / 4, 3.4 / 4, 2 / 4, 0], atol=1e-7)


def test_bn_scale_leaves_whole_what_has_no_batch_normalization():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    surgery = StructuredPruning(importance="bn_scale")(model, noise(3))
    assert (surgery.model[0].out_features, surgery.model[3].out_features) == (4, 8)
    assert surgery.notes == ("3 stay whole: they have no batch normalization to judge them by.",)


def test_bn_scale_refuses_a_model_without_any():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(PassError, match=r"pruning\.importance=bn_scale needs batch normalization, .* take l1, l2 or"):
        StructuredPruning(importance="bn_scale")(model, noise(3))


def test_random_follows_the_seed_and_nothing_else():
    model, bench = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 3)), noise(3)
    one, two = (rank(model, groups(model, bench), "random", bench)[0].order for _ in range(2))
    nn.init.normal_(model[0].weight)
    same = rank(model, groups(model, bench), "random", bench)[0].order
    bench.seed = 1
    other = rank(model, groups(model, bench), "random", bench)[0].order
    assert one.tolist() == two.tolist() == same.tolist() != other.tolist()


class Convolutions(nn.Module):
    """Residual, grouped, transposed and flattened."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.normalization = nn.BatchNorm2d(8)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2), nn.Linear(6 * 25, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.one(x)
        x = (x + self.normalization(self.two(x))).relu()
        return self.head(self.last(self.up(x).relu().flatten(1)).relu())


@pytest.mark.parametrize("power", [1, 2])
def test_sums_of_powers_are_those_of_torch_pruning(power):
    from torch_pruning import DependencyGraph
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    torch.manual_seed(0)
    model, bench = Convolutions().eval(), noise(2, 4, 4)
    elements = {name: parameter.detach().abs() ** power for name, parameter in model.named_parameters()}
    given = {group.name: unit_scores(group, elements)[0] for group in groups(model, bench)}
    graph = DependencyGraph().build_dependency(model, example_inputs=torch.zeros(2, 2, 4, 4))
    score = GroupMagnitudeImportance(p=power, group_reduction="sum", normalizer=None)
    names = {module: name for name, module in model.named_modules()}
    wanted = {names[group[0].dep.target.module]: score(group) for group in graph.get_all_groups()}
    assert sorted(given) == ["last", "one", "up"]
    for name, scores in given.items():
        torch.testing.assert_close(scores.float(), wanted[name].detach())


def test_inputs_of_grouped_convolutions_count_in_their_own_group():
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Flatten())
    model.append(nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight)
    # Outputs 0-2 see the inputs 0 and 1, outputs 3-5 the inputs 2 and 3.
    model[1].weight.data = torch.arange(12.0).view(6, 2, 1, 1)
    group = next(each for each in groups(model, noise(1, 1, 1)) if each.name == "0")
    by_channel = [0 + 4 + 16, 1 + 9 + 25, 36 + 64 + 100, 49 + 81 + 121]
    # The same place goes in both blocks, so that places 0 and 1 are judged.
    assert unit_scores(group, squares(model))[0].tolist() == [
        by_channel[0] + by_channel[2],
        by_channel[1] + by_channel[3],
    ]


def test_a_group_loses_the_logarithm_of_the_share_that_it_keeps():
    bench = noise(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    (group,) = groups(model, bench)
    ranked = Ranked.of(group, torch.tensor([[4.0, 1.0, 3.0, 2.0]]), weight=2.0)
    assert ranked.order.tolist() == [[1, 3, 2, 0]]
    np.testing.assert_allclose([ranked.loss(kept) for kept in (4, 3, 2)], -2 * np.log([1, 0.9, 0.7]), atol=1e-12)
    assert ranked.loss(0) > 50
