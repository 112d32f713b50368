"""What an artefact may run when it is loaded, what a key may leave out, and which rows go where."""

import json
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.core.errors import HastenError
from hasten.core.interfaces import Table
from hasten.core.recipe import Recipe
from hasten.data.prepare import SPLITS, write
from hasten.stages.data import Data
from hasten.tasks.classification import Classification
from hasten.tasks.unlabelled import Unlabelled


@pytest.mark.parametrize("place", ["engine", "transform", "model"])
def test_no_function_of_ours_is_run_in_the_place_of_a_class(place: str) -> None:
    """`stored.store` copies a file to wherever its arguments say."""
    Path("mine.txt").write_text("theirs")
    target = {"engine": "hasten.engines.", "transform": "hasten.data.transforms.", "model": "hasten.models."}[place]
    function = {"engine": "stored.store", "transform": "checks.told", "model": "sizes.check_sizes"}[place]
    harmful = {"_target_": target + function, "source": "mine.txt", "file": "copied.txt", "compressed": False}
    harmless = {"_target_": "hasten.engines.onnxruntime.OnnxRuntime"}
    folder = Path("model")
    folder.mkdir()
    described = {
        "format": 2,
        "signature": {"inputs": [], "output_shape": [1]},
        "preprocessing": {"columns": {}, "transforms": [harmful] if place == "transform" else []},
        "engine": harmful if place == "engine" else harmless,
        "provenance": {},
    }
    (folder / "model.json").write_text(json.dumps(described))
    if place == "model":
        (folder / "module.json").write_text(json.dumps({"arch": harmful}))
    with pytest.raises(HastenError, match=f"{function} is no {place} of hasten"):
        hasten.load(folder)
    assert not Path("copied.txt").exists()


def test_the_order_in_which_shares_are_spelt_moves_no_row() -> None:
    table = Table(inputs={"input": np.arange(20.0, dtype=np.float32)[:, None]}, targets=None, in_order=True)
    shares = {"train": 0.5, "validate": 0.25, "test": 0.25}
    firsts = []
    for place, names in enumerate((SPLITS, SPLITS[::-1])):
        folder = Path(str(place))
        folder.mkdir()
        spelt = {name: shares[name] for name in names}
        prepared = write(folder, table, task=Unlabelled(), shares=spelt, seed=0, normalize=False, source="")
        firsts.append([prepared.rows(split).inputs["input"][0, 0] for split in SPLITS])
    assert firsts == [[0, 10, 15]] * 2


def test_another_tokenizer_in_the_folder_is_another_data_stage() -> None:
    folder = Path("tokens")
    folder.mkdir()
    transform = {"_target_": "hasten.data.transforms.HuggingFaceTokens", "column": "text", "length": 4}
    data = {"_target_": "hasten.data.noise.Noise", "shape": [3], "split": {}, "normalize": False}
    task = {"_target_": "hasten.tasks.unlabelled.Unlabelled", "metrics": {}}
    data["transforms"] = [{**transform, "folder": str(folder)}]
    recipe = Recipe(overrides=(), config={"data": data, "task": task, "seed": 0})

    def key(**files: str) -> str:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(content)
        return Data().ingredients(recipe, {}).key

    first = key(tokenizer="{}")
    assert key(tokenizer='{"other": 1}') != first
    assert key(tokenizer="{}") == first


def test_the_constant_answer_of_classes_has_the_least_cross_entropy() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    logits = Classification().constant(labels, 1)[0].astype(float)
    log_shares = logits - np.log(np.exp(logits).sum())
    assert -log_shares[labels].mean() == pytest.approx(-sum(p * np.log(p) for p in (0.5, 0.3, 0.2)), abs=1e-4)
