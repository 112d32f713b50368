"""Attention heads and hidden units of recurrent layers that are really gone."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from hasten.artefacts import module as artefact
from hasten.artefacts.capture import write_graph
from hasten.core.interfaces import Input, Rows, Signature
from hasten.passes.pruning.structured import StructuredPruning

LENGTH, WORDS = 6, 20
TEXTS = tuple(Input(name=name, shape=(LENGTH,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
TRANSFORMER = {
    "_target_": "hasten.models.transformer.Transformer",
    "width": 16,
    "num_heads": 4,
    "num_layers": 2,
    "feedforward": 24,
}
SERIES = (Input(shape=(3, 9)),)
RECURRENT = {"_target_": "hasten.models.recurrent.Recurrent", "hidden": 12, "highway": 2}


class Bench:
    seed = 0

    def __init__(self, **inputs):
        self.train = Rows(inputs=inputs, targets=np.arange(16) % 3)

    def fit(self, model):
        return model.eval()


def tokens(rows=16):
    draw = np.random.default_rng(0)
    mask = np.arange(LENGTH) < draw.integers(1, LENGTH + 1, (rows, 1))
    return {"ids": draw.integers(0, WORDS, (rows, LENGTH)), "mask": mask.astype(np.int64)}


def series(rows=16):
    return {"input": np.random.default_rng(0).normal(size=(rows, 3, 9)).astype(np.float32)}


def built(arch, inputs):
    return artefact.build(arch, inputs, (3,), seed=0, facts={"vocabulary_size": WORDS})


def outputs(model, rows):
    with torch.no_grad():
        return artefact.forward(model.eval(), {name: torch.from_numpy(values) for name, values in rows.items()})


def test_heads_are_gone_from_all_four_layers():
    model, _ = built(TRANSFORMER, TEXTS)
    surgery = StructuredPruning(sparsity=0.5)(model, Bench(**tokens()))
    for layer in surgery.model.layers:
        attention = layer.attention
        shapes = [tuple(part.weight.shape) for part in (attention.query, attention.key, attention.value, attention.out)]
        assert shapes == [(8, 16), (8, 16), (8, 16), (16, 8)]
        assert attention.head_size == 4
        assert layer.linear1.out_features == 12
    assert surgery.notes == ()


def test_only_whole_heads_go_and_those_that_do_nothing_go_first():
    model, _ = built(TRANSFORMER, TEXTS)
    with torch.no_grad():
        for layer, head in zip(model.layers, (2, 0), strict=True):
            places = slice(4 * head, 4 * head + 4)
            for part in (layer.attention.query, layer.attention.key, layer.attention.value):
                part.weight[places] = 0
            layer.attention.out.weight[:, places] = 0
    rows = tokens()
    surgery = StructuredPruning(sparsity=0.25, round_to=24)(model, Bench(**rows))
    assert list(surgery.steps[0]["removed"].values()) == [[8, 9, 10, 11], [0, 1, 2, 3]]
    torch.testing.assert_close(outputs(surgery.model, rows), outputs(model, rows), rtol=1e-4, atol=1e-5)


def test_heads_stay_where_they_are_not_wanted():
    model, _ = built(TRANSFORMER, TEXTS)
    layer = StructuredPruning(heads=False)(model, Bench(**tokens())).model.layers[0]
    assert (layer.attention.query.out_features, layer.linear1.out_features) == (16, 12)


def test_heads_stay_whole_where_the_model_counts_on_their_number(reader, many_texts):
    bench = Bench()
    bench.train = Rows(inputs=many_texts, targets=np.zeros(64, dtype=np.int64))
    surgery = StructuredPruning()(artefact.rebuild(reader.module), bench)
    assert surgery.model.query.out_features == 16
    assert surgery.notes == ("heads of value stay whole: the model counts on all 4.",)


class Numbered(nn.Module):
    """An attention that keeps the number of its heads, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_size, self.all_head_size = 4, 4, 16
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        rows, length, _ = x.shape
        heads = (rows, length, self.num_heads, self.head_size)
        query, key, value = (layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = torch.softmax(query @ key.transpose(2, 3) / 2, -1) @ value
        return x + self.out(mixed.transpose(1, 2).reshape(rows, length, self.all_head_size))


class Classifier(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, 16), Numbered(), nn.Linear(16, num_outputs)

    def forward(self, x):
        return self.head(self.attention(self.embed(x.transpose(1, 2))).mean(1))


def test_modules_that_count_their_heads_are_told(tmp_path):
    model, arch = built({"_target_": f"{__name__}.Classifier"}, SERIES)
    rows = series()
    surgery = StructuredPruning(sparsity=0.25)(model, Bench(**rows))
    attention = surgery.model.attention
    assert (attention.num_heads, attention.all_head_size, attention.head_size) == (3, 12, 4)
    assert attention.key.out_features == 12
    artefact.save(tmp_path, arch, surgery.model, surgery.steps)
    assert torch.equal(outputs(artefact.rebuild(tmp_path), rows), outputs(surgery.model, rows))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_hidden_units_are_gone_from_every_gate_and_every_reader(cell, num_layers):
    model, _ = built({**RECURRENT, "cell": cell, "num_layers": num_layers}, SERIES)
    pruned = StructuredPruning(sparsity=0.5, round_to=2)(model, Bench(**series())).model
    gates = {"lstm": 4, "gru": 3}[cell]
    assert (pruned.recurrent.hidden_size, pruned.output.in_features) == (6, 6)
    for layer in range(num_layers):
        assert tuple(pruned.recurrent.get_parameter(f"weight_hh_l{layer}").shape) == (gates * 6, 6)
        assert tuple(pruned.recurrent.get_parameter(f"weight_ih_l{layer}").shape) == (gates * 6, 6 if layer else 3)
        assert tuple(pruned.recurrent.get_parameter(f"bias_hh_l{layer}").shape) == (gates * 6,)
    assert tuple(pruned.output.weight.shape) == (3, 6)
    assert pruned.highway.in_features == 6


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_units_that_nothing_reads_go_first_and_change_nothing(cell):
    model, _ = built({**RECURRENT, "cell": cell, "num_layers": 2}, SERIES)
    idle, recurrent = {0: [1, 2, 7], 1: [0, 5, 11]}, model.recurrent
    with torch.no_grad():
        for layer, units in idle.items():
            recurrent.get_parameter(f"weight_hh_l{layer}")[:, units] = 0
            for name in ("weight_ih", "weight_hh"):
                gates = recurrent.get_parameter(f"{name}_l{layer}")
                gates.view(-1, 12, gates.shape[1])[:, units] *= 1e-3
        recurrent.weight_ih_l1[:, idle[0]] = 0
        model.output.weight[:, idle[1]] = 0
    rows = series()
    surgery = StructuredPruning(sparsity=0.25, round_to=1)(model, Bench(**rows))
    assert surgery.steps[0]["removed"] == {"recurrent.l0": idle[0], "recurrent.l1": idle[1]}
    torch.testing.assert_close(outputs(surgery.model, rows), outputs(model, rows), rtol=1e-5, atol=1e-6)


class Stacked(nn.Module):
    """A convolution into a GRU into an LSTM, of which the final state is read."""

    def __init__(self, num_outputs):
        super().__init__()
        self.convolution = nn.Conv1d(3, 8, 3)
        self.first, self.second = nn.GRU(8, 12, batch_first=True), nn.LSTM(12, 8, batch_first=True)
        self.hidden, self.output = nn.Linear(8, 8), nn.Linear(8, num_outputs)

    def forward(self, x):
        _, (state, _) = self.second(self.first(self.convolution(x).transpose(1, 2))[0])
        return self.output(self.hidden(state[-1]).relu())


def test_layers_between_recurrent_ones_follow(tmp_path):
    model, arch = built({"_target_": f"{__name__}.Stacked"}, SERIES)
    rows = series()
    surgery = StructuredPruning(sparsity=0.5)(model, Bench(**rows))
    pruned = surgery.model
    assert (pruned.first.hidden_size, pruned.second.input_size) == (8, 8)  # of 12 the multiple of 4 nearest to 6
    assert (pruned.second.hidden_size, pruned.hidden.in_features, pruned.hidden.out_features) == (4, 4, 4)
    assert pruned.convolution.out_channels == 8  # what leads into a recurrent layer stays
    artefact.save(tmp_path, arch, pruned, surgery.steps)
    assert torch.equal(outputs(artefact.rebuild(tmp_path), rows), outputs(pruned, rows))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.normalization = nn.GRU(3, 8, batch_first=True), nn.LayerNorm(8)
        self.hidden, self.output = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        states = self.recurrent(x.transpose(1, 2))[0]
        return self.output(self.hidden(self.normalization(states[:, -1]) + 0 * states[:, 0]).relu())


def test_hidden_units_stay_that_something_else_reads():
    pruned = StructuredPruning()(Normalised(), Bench(**series())).model
    assert (pruned.recurrent.hidden_size, pruned.hidden.out_features) == (8, 4)


@pytest.mark.filterwarnings("ignore:.*_flat_weights.* were assigned during export:UserWarning")
@pytest.mark.parametrize(
    ("arch", "inputs", "rows"),
    [(TRANSFORMER, TEXTS, tokens()), ({**RECURRENT, "num_layers": 2}, SERIES, series())],
    ids=["transformer", "recurrent"],
)
def test_what_is_pruned_twice_is_rebuilt_bit_for_bit_and_runs_in_an_engine(tmp_path, arch, inputs, rows):
    model, filled = built(arch, inputs)
    surgery = StructuredPruning(sparsity=0.75, round_to=2, rounds=2)(model, Bench(**rows))
    (tmp_path / "module").mkdir()
    artefact.save(tmp_path / "module", filled, surgery.model, json.loads(json.dumps(surgery.steps)))
    rebuilt = artefact.rebuild(tmp_path / "module")
    assert len(artefact.surgery(tmp_path / "module")) == 2
    assert torch.equal(outputs(rebuilt, rows), outputs(surgery.model, rows))
    signature = Signature(inputs=inputs, output_shape=(3,))
    graph = write_graph(rebuilt, tmp_path / "module", signature, {k: v[:4] for k, v in rows.items()}, tmp_path)
    (given,) = onnxruntime.InferenceSession(str(graph.onnx)).run(None, rows)
    np.testing.assert_allclose(given, outputs(rebuilt, rows).numpy(), rtol=1e-4, atol=1e-5)
    loss = nn.functional.cross_entropy(
        artefact.forward(rebuilt.train(), {name: torch.from_numpy(values) for name, values in rows.items()}),
        torch.arange(16) % 3,
    )
    loss.backward()
    used = [parameter for name, parameter in rebuilt.named_parameters() if not name.endswith("key.bias")]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in used)


class Packed(nn.Module):
    """Reads sequences up to their lengths."""

    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(3, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(torch.relu(self.hidden(self.cells(packed)[1][-1])))


@pytest.mark.parametrize("amount", ["sparsity", "flops_cut"])
def test_layers_that_read_packed_sequences_stay_whole(amount):
    steps = np.random.default_rng(0).normal(size=(16, 9, 3)).astype(np.float32)
    rows = {"x": steps, "lengths": 1 + np.arange(16) % 9}
    knobs = {"sparsity": None, amount: 0.15}
    pruned = StructuredPruning(**knobs)(Packed(), Bench(**rows)).model
    assert pruned.cells.hidden_size == 12
    assert pruned.hidden.out_features < 16


class Named(nn.Module):
    """Gives its attention everything by name."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        seen, _ = self.attention(query=x, key=x, value=x)
        return self.head(torch.relu(self.hidden(seen.mean(1))))


def test_arguments_may_be_given_by_name():
    rows = {"x": np.random.default_rng(0).normal(size=(16, 5, 8)).astype(np.float32)}
    pruned = StructuredPruning(sparsity=None, flops_cut=0.05)(Named(), Bench(**rows)).model
    assert pruned.hidden.out_features < 16
