"""Models of transformers, from a folder that a tiny one was saved to."""

import json
import os
import socket

import pytest
import torch

from hasten.core.interfaces import Input
from hasten.models.huggingface import HuggingFace

LENGTH, WORDS = 6, 20
INPUTS = tuple(
    Input(name=name, shape=(LENGTH,), dtype="int64", dynamic=(0,)) for name in ("input_ids", "attention_mask")
)
BERT = {
    "model_type": "bert",
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """A network must not be asked for."""
    pytest.importorskip("transformers", reason="hasten[transformers] is not installed")

    def refuse(*arguments, **others):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def encoder():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**{name: value for name, value in BERT.items() if name != "model_type"})
    return transformers.BertModel(config).eval()


@pytest.fixture
def folder(encoder, tmp_path):
    """An encoder without a classifier, as pretrained ones are published."""
    encoder.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def tokens(rows, length=LENGTH):
    mask = torch.rand(rows, length) < 0.7
    mask[:, 0] = True
    return {"input_ids": torch.randint(0, WORDS, (rows, length)), "attention_mask": mask.long()}


def test_an_embedding_is_the_mean_of_the_tokens_of_the_mask(folder, encoder):
    model = HuggingFace(folder=folder, head="embedding").eval()
    rows = tokens(3)
    vectors, mask = encoder(**rows).last_hidden_state, rows["attention_mask"].bool()
    wanted = torch.stack([vectors[row, mask[row]].mean(0) for row in range(3)])
    torch.testing.assert_close(model(**rows), wanted)


def test_an_embedding_carries_no_weights_that_it_does_not_use(folder, assert_all_learn):
    model = HuggingFace(folder=folder, head="embedding")
    assert_all_learn(model, "key.bias", **tokens(4))


def test_a_mask_of_nothing_gives_zeros(folder):
    model = HuggingFace(folder=folder, head="embedding").eval()
    rows = tokens(2)
    rows["attention_mask"][1] = 0
    assert not model(**rows)[1].any()


def test_gives_the_logits_of_the_saved_classifier(folder):
    import transformers

    saved = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    saved.save_pretrained(folder)
    rows = tokens(4)
    torch.testing.assert_close(HuggingFace(folder=folder).eval()(**rows), saved(**rows).logits)


def test_says_which_head_starts_at_random(folder, caplog):
    assert HuggingFace(folder=folder, num_outputs=3).eval()(**tokens(2)).shape == (2, 3)
    assert "has no weights for classifier.bias, classifier.weight, which start at random: train them" in caplog.text


def test_says_nothing_else(folder, capfd):
    HuggingFace(folder=folder, num_outputs=3)
    assert capfd.readouterr().out == ""


def test_half_precision_is_loaded_as_float32(folder, encoder):
    encoder.half().save_pretrained(folder)
    model = HuggingFace(folder=folder, head="embedding")
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("head", ["classification", "embedding"])
def test_is_rebuilt_from_its_portable_arguments_without_the_folder(folder, head):
    model = HuggingFace(folder=folder, head=head, num_outputs=3 if head == "classification" else None).eval()
    arguments = json.loads(json.dumps(model.portable_arguments()))
    assert arguments["folder"] is None
    assert os.path.dirname(folder) not in json.dumps(arguments)
    rebuilt = HuggingFace(**arguments).eval()
    assert rebuilt.portable_arguments() == arguments
    rebuilt.load_state_dict(model.state_dict())
    rows = tokens(3)
    assert torch.equal(rebuilt(**rows), model(**rows))


def test_is_constructed_from_a_config_alone():
    torch.manual_seed(0)
    model = HuggingFace(config=BERT, num_outputs=5).eval()
    layer = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 2 * 8
    embeddings, pooler, classifier = (WORDS + 10 + 2) * 8 + 2 * 8, 8 * 8 + 8, 8 * 5 + 5
    assert sum(p.numel() for p in model.parameters()) == embeddings + 2 * layer + pooler + classifier


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classification", "embedding"])
def test_engines_agree_for_any_batch_and_length(head, engines, assert_engines_agree):
    torch.manual_seed(0)
    outputs = 3 if head == "classification" else None
    model = HuggingFace(config=BERT, head=head, num_outputs=outputs).eval()
    running = engines(model, *INPUTS, num_outputs=outputs or 8)
    for rows in (1, 2, 5):
        for length in (1, 2, LENGTH):
            assert_engines_agree(running, model, **tokens(rows, length))


def test_code_of_a_folder_is_never_run(folder, tmp_path):
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    ran = tmp_path / "ran"
    (tmp_path / "bert" / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    for model_type in ("bert", "mine"):
        changed = {**config, "model_type": model_type, "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
        (tmp_path / "bert" / "config.json").write_text(json.dumps(changed))
        if model_type == "mine":
            with pytest.raises(ValueError, match="HuggingFace: transformers has no model_type 'mine'"):
                HuggingFace(folder=folder)
        else:
            HuggingFace(folder=folder, head="embedding")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "needs either folder or config"),
        ({"folder": "nowhere", "config": BERT}, "needs either folder or config"),
        ({"folder": "nowhere"}, "folder=nowhere has no config.json"),
        ({"config": {"hidden_size": 8}}, "the config has no model_type"),
        ({"config": {**BERT, "hidden_size": 9}}, r"hidden size \(9\) is not a multiple"),
        ({"config": BERT, "head": "regression"}, "head must be classification or embedding, got 'regression'"),
        ({"config": BERT, "head": "embedding", "num_outputs": 3}, "an embedding has the model's 8 outputs"),
        ({"config": {"model_type": "vit"}}, "transformers has no classification model of type vit"),
    ],
)
def test_refuses_what_it_can_not_be(arguments, problem):
    with pytest.raises(ValueError, match=f"HuggingFace.*{problem}"):
        HuggingFace(**arguments)


def test_refuses_a_folder_without_weights_or_with_pickled_ones(folder, tmp_path):
    os.remove(tmp_path / "bert" / "model.safetensors")
    torch.save({}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"bert has no model\.safetensors; pickled weights are not read"):
        HuggingFace(folder=folder)


def test_refuses_a_folder_with_the_weights_of_another_model(folder, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "bert" / "model.safetensors"
    save_file({"weight": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"bert has no weights for bert\.embeddings\.\S+, .* and \d+ more of a bert"):
        HuggingFace(folder=folder)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"bert can't be loaded: "):
        HuggingFace(folder=folder)


def test_refuses_more_outputs_than_the_saved_classifier_has(folder):
    HuggingFace(folder=folder, num_outputs=3).model.save_pretrained(folder)
    problem = r"does not fit config\.json and num_outputs=4: classifier\.bias \(3,\) instead of \(4,\)"
    with pytest.raises(ValueError, match=problem):
        HuggingFace(folder=folder, num_outputs=4)
