"""The Transformer encoder."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hasten.core.interfaces import Input
from hasten.models.transformer import Attention, EncoderLayer, Transformer
from hasten.passes.pruning.structured import StructuredPruning

LENGTH, WORDS = 6, 20
INPUTS = tuple(Input(name=name, shape=(LENGTH,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))


def small(**more):
    torch.manual_seed(0)
    sizes = {"width": 8, "num_heads": 2, "num_layers": 2, "feedforward": 12, "dropout": 0.1}
    return Transformer(**{"input_shape": (LENGTH,), "vocabulary_size": WORDS, "num_outputs": 3, **sizes, **more})


def tokens(rows, length=LENGTH):
    """Ids, and a mask that begins with at least one token."""
    mask = torch.rand(rows, length) < 0.7
    mask[:, 0] = True
    return {"ids": torch.randint(0, WORDS, (rows, length)), "mask": mask.long()}


def test_has_the_parameters_of_its_layers():
    layer = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 2 * 8
    wanted = WORDS * 8 + LENGTH * 8 + 2 * layer + 2 * 8 + 8 * 3 + 3
    assert sum(p.numel() for p in small().parameters()) == wanted


def test_attention_is_the_softmax_of_scaled_products_in_each_head():
    torch.manual_seed(0)
    attention = Attention(6, num_heads=2)
    x = torch.randn(1, 4, 6)
    query, key, value = (layer(x)[0].view(4, 2, 3) for layer in (attention.query, attention.key, attention.value))
    heads = []
    for head in range(2):
        scores = query[:, head] @ key[:, head].T / math.sqrt(3)
        heads.append(scores.softmax(dim=1) @ value[:, head])
    torch.testing.assert_close(attention(x, torch.zeros(1, 1, 1, 4))[0], attention.out(torch.cat(heads, dim=1)))


def test_a_layer_computes_what_the_one_of_pytorch_computes():
    torch.manual_seed(0)
    layer = EncoderLayer(8, num_heads=2, feedforward=12, dropout=0.0)
    other = torch.nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    attention = layer.attention
    parts = (attention.query, attention.key, attention.value)
    other.self_attn.in_proj_weight.data = torch.cat([part.weight for part in parts]).detach()
    other.self_attn.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
    for mine, theirs in [
        (attention.out, other.self_attn.out_proj),
        (layer.linear1, other.linear1),
        (layer.linear2, other.linear2),
    ]:
        theirs.load_state_dict(mine.state_dict())
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    mask[1, 3:] = 0
    given = layer(x, (1 - mask)[:, None, None] * -1e4)
    torch.testing.assert_close(given, other(x, src_key_padding_mask=mask == 0))


def test_padding_changes_nothing_whatever_it_holds():
    model = small().eval()
    ids, ones = torch.randint(0, WORDS, (2, 4)), torch.ones(2, 4, dtype=torch.int64)
    mask = functional.pad(ones, (0, 2))
    for content in (0, 7):
        torch.testing.assert_close(model(functional.pad(ids, (0, 2), value=content), mask), model(ids, ones))


def test_knows_the_order_of_tokens():
    model = small().eval()
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.allclose(model(ids, torch.ones(1, 3)), model(ids.flip(1), torch.ones(1, 3)), atol=1e-4)


def test_a_row_of_padding_alone_gives_the_bias():
    model = small().eval()
    outputs = model(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    torch.testing.assert_close(outputs, model.classifier.bias.expand(2, 3))


def test_rows_of_padding_alone_do_not_spoil_the_gradients():
    model = small()
    rows = tokens(3)
    rows["mask"][1] = 0
    model(**rows).sum().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_every_parameter_learns(assert_all_learn):
    assert_all_learn(small(), "key.bias", **tokens(4))  # what all keys share cancels out of the softmax


@pytest.mark.slow
def test_engines_agree_for_any_batch_and_length(engines, assert_engines_agree):
    model = small().eval()
    running = engines(model, *INPUTS, num_outputs=3)
    for rows in (1, 2, 5):
        for length in range(1, LENGTH + 1):
            assert_engines_agree(running, model, **tokens(rows, length))
    empty = tokens(3)
    empty["mask"][1] = 0
    assert_engines_agree(running, model, **empty)


def test_pruning_takes_heads_and_units_of_the_feedforward_layers(untrained):
    rng = np.random.default_rng(0)
    bench = untrained(ids=rng.integers(0, WORDS, (8, LENGTH)), mask=np.ones((8, LENGTH), dtype=np.int64))
    surgery = StructuredPruning(sparsity=0.5, round_to=2)(small(), bench)
    for layer in surgery.model.layers:
        assert (layer.attention.query.out_features, layer.attention.out.in_features) == (4, 4)
        assert (layer.linear1.out_features, layer.linear2.in_features) == (6, 6)
    assert surgery.model(**tokens(2)).shape == (2, 3)


def test_heads_can_be_cut_out_of_the_linear_layers_alone():
    torch.manual_seed(0)
    attention = Attention(6, num_heads=3)
    x, bias = torch.randn(2, 4, 6), torch.zeros(1, 1, 1, 4)
    silent = attention.out.weight.detach().clone()
    silent[:, 2:4] = 0  # the second head
    attention.out.weight.data = silent
    wanted = attention(x, bias)
    kept = [0, 1, 4, 5]
    for layer in (attention.query, attention.key, attention.value):
        layer.weight.data, layer.bias.data = layer.weight.data[kept], layer.bias.data[kept]
    attention.out.weight.data = attention.out.weight.data[:, kept]
    torch.testing.assert_close(attention(x, bias), wanted)


def test_refuses_rows_that_are_no_sequences():
    with pytest.raises(ValueError, match=r"Transformer needs rows of input_shape \(length,\), got \(3, 8, 8\)"):
        small(input_shape=(3, 8, 8))


@pytest.mark.parametrize("name", ["num_outputs", "vocabulary_size", "width", "num_heads", "num_layers", "feedforward"])
def test_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"Transformer: {name} must be at least 1, got 0"):
        small(**{name: 0})


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide width, got num_heads=3, width=8"):
        small(num_heads=3)


def test_asks_for_a_vocabulary_that_the_data_do_not_have():
    with pytest.raises(ValueError, match="Transformer: vocabulary_size is null"):
        small(vocabulary_size=None)
