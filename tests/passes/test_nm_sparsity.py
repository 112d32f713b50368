"""N of every M weights: the pattern, which weights stay, and where it can gain anything."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Rows, Target
from hasten.passes.pruning.nm import NMSparsity
from hasten.passes.pruning.semi_structured import is_semi_structured, kernels_missing, to_semi_structured
from hasten.tasks.classification import Classification

CPU = Target(device="cpu", threads=1, batch_size=1, engines=("eager",))


class Bench:
    """Rows of noise, and a fine-tuning with AdamW on a copy."""

    seed = 0
    task = Classification()

    def __init__(self, *shape, steps=0):
        inputs = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
        self.train = Rows(inputs={"input": inputs}, targets=np.arange(32) % 2)
        self.steps = steps

    def fit(self, model):
        student = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(self.steps):
            optimizer.zero_grad()
            outputs = student(torch.from_numpy(self.train.inputs["input"]))
            self.task.loss(outputs, torch.from_numpy(self.train.targets)).backward()
            optimizer.step()
        return student.eval()


def linear(weights):
    """One layer with those weights, and one that stays whole."""
    model = nn.Sequential(nn.Linear(len(weights[0]), len(weights)), nn.Linear(len(weights), 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weights))
    return model


def test_keeps_the_greatest_of_each_group():
    model = linear([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3], [0.0, 0.0, 0.0, 5.0, 9.0, 8.0, 7.0, 6.0]])
    pruned = NMSparsity()(model, Bench(8)).model
    expected = [[0, -4, 3, 0, 0, 0, -0.4, 0.3], [0, 0, 0, 5, 9, 8, 0, 0]]
    assert torch.equal(pruned[0].weight, torch.tensor(expected))
    assert torch.equal(pruned[1].weight, model[1].weight)


def test_groups_of_a_convolution_are_inputs_at_one_place_of_the_kernel():
    model = nn.Sequential(nn.Conv1d(4, 1, 2), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]]))
    pruned = NMSparsity(n=1)(model, Bench(4, 5)).model
    assert pruned[0].weight.tolist() == [[[0, 8], [0, 0], [0, 0], [4, 0]]]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 5).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.sampled_from(["magnitude", "taylor", "random"]),
)
def test_every_group_holds_n_of_m_and_nothing_that_went_was_greater(pattern, importance):
    n, m = pattern
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2 * m, 3), nn.ReLU(), nn.Conv2d(2 * m, 6, 2), nn.Flatten(), nn.Linear(6, m), nn.Linear(m, 2)
    ).eval()
    surgery = NMSparsity(n=n, m=m, importance=importance)(model, Bench(1, 4, 4))
    layers = ["2.weight", "4.weight"] if 6 % m == 0 else ["2.weight"]
    assert surgery.steps == ({"technique": "N:M sparsity", "n": n, "m": m, "layers": layers, "resized": {}},)
    for name in layers:
        before, after = (each.get_parameter(name).detach() for each in (model, surgery.model))
        sizes, stays = (
            values.movedim(1, -1).reshape(-1, m) for values in (before.abs(), (after != 0).to(torch.float32))
        )
        assert (stays.sum(1) == n).all()
        assert torch.equal(before[after != 0], after[after != 0])
        if importance == "magnitude":
            for size, stay in zip(sizes, stays.bool(), strict=True):
                assert size[~stay].max() <= size[stay].min()
    whole = {name for name, _ in model.named_parameters()} - set(layers)
    assert all(torch.equal(model.get_parameter(name), surgery.model.get_parameter(name)) for name in whole)


def test_keeps_the_pattern_while_the_rest_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)).eval()
    untouched, trained = (NMSparsity()(model, Bench(8, steps=steps)).model for steps in (0, 10))
    zero = trained[0].weight == 0
    assert torch.equal(zero, untouched[0].weight == 0)
    assert not torch.isclose(trained[0].weight[~zero], untouched[0].weight[~zero], atol=1e-3).any()


def test_says_what_it_left_and_that_nothing_gains_time_here():
    pattern, zeros = NMSparsity()(linear([[1.0] * 8] * 4), Bench(8)).notes
    assert pattern.startswith(
        "layers with 2 of every 4 weights left: 1; only semi-structured kernels of an NVIDIA GPU "
    )
    assert pattern.endswith(" gain time from that, nothing on a CPU does")
    assert zeros.startswith("35 % of the 46 parameters are zero")  # 16 of 32 + 4 + 8 + 2


def test_a_target_without_kernels_gains_nothing_unless_it_is_told_that_it_is_for_another():
    assert NMSparsity(without_kernels=True).supports(CPU) is None
    reason = NMSparsity().supports(CPU)
    assert reason is not None
    assert "target.device=cpu has none" in reason


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4)])
def test_keeps_less_than_everything(n, m):
    with pytest.raises(ConfigError, match=rf"^pruning\.n must be less than pruning\.m={m}, got {n} \(pruning\.n\)$"):
        NMSparsity(n=n, m=m)


def test_refuses_a_model_whose_layers_can_not_be_divided():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(4, 2))
    told = r"^no linear layer or convolution of Sequential .* a multiple of pruning\.m=4 inputs: there are 6, 9$"
    with pytest.raises(PassError, match=told):
        NMSparsity()(model, Bench(6))


def test_the_pattern_is_what_pytorchs_compressed_format_takes():
    """Against PyTorch's own conversion, which drops whatever is more than 2 of 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).eval()
    dense = model[0].weight.detach().half()
    masked = NMSparsity()(model, Bench(64)).model[0].weight.detach().half()
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(masked))
    assert torch.equal(back, masked)
    assert is_semi_structured(masked)
    assert not is_semi_structured(dense)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 6), torch.zeros(4, 4, 3), torch.tensor([[0.0, 1, 1, 0, 1, 0, 1, 1]])]
)
def test_other_patterns_and_shapes_are_not_taken_for_it(weight):
    assert not is_semi_structured(weight)


def test_conversion_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PassError, match=r"compute capability 8\.0 or more\) skip .*: PyTorch sees no NVIDIA GPU$"):
        to_semi_structured(linear([[1.0] * 8]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(PassError, match=r"Tesla T4 has compute capability 7\.5, and 8\.0 is the first"):
        to_semi_structured(linear([[1.0] * 8]))


def test_converts_what_has_the_pattern_and_a_shape_that_some_kernel_takes(monkeypatch):
    def compressed(weight):
        if weight.shape[0] % 16:
            raise RuntimeError("Error original_tensor.shape is not supported!\nBoth dimensions")
        return weight * 2

    monkeypatch.setattr("hasten.passes.pruning.semi_structured.kernels_missing", lambda: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compressed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)).eval()
    pruned = NMSparsity()(model, Bench(8)).model
    sparse, converted = to_semi_structured(pruned)
    assert converted == ("0",)  # the second has 8 outputs, the third stayed whole
    assert torch.equal(sparse[0].weight, 2 * pruned[0].weight)
    assert torch.equal(sparse[1].weight, pruned[1].weight)
    with pytest.raises(
        PassError, match=r"^no linear layer of Sequential can be converted: 0: Error .* not supported!$"
    ):
        to_semi_structured(nn.Sequential(pruned[1]))
    with pytest.raises(PassError, match=r"can be converted: none has 2 of every 4 weights at zero$"):
        to_semi_structured(nn.Sequential(model[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converted_layers_give_what_the_dense_ones_give(dtype):
    if reason := kernels_missing():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    pruned = NMSparsity(without_kernels=True)(model, Bench(128)).model.to("cuda", dtype)
    sparse, converted = to_semi_structured(pruned)
    assert converted == ("0", "2")
    rows = torch.randn(64, 128, device="cuda", dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(rows), pruned(rows), rtol=0.02, atol=0.02)
