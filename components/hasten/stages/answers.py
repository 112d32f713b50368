"""The answers stage: what the teachers give for the training rows, computed once for all that is distilled from them.

An answer always belongs to its row. The stage's key holds the keys of the teachers and of the data, which in turn hold
the fingerprint of the rows, their transforms and their split, and the answers lie in the order of that data artefact's
training rows, the only ones that they are read beside. Rows that are changed at random while the student trains have
no stored answer at all: then the teachers are asked about the very tensors that the student got (`training.lesson`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.artefacts.module import rebuild
from hasten.core.construct import construct
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, declared, sources, teaching_stages
from hasten.training.determinism import reproducible
from hasten.training.lesson import mean_answer
from hasten.training.predict import predict

_OUTPUTS = "outputs.npy"
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Answers(Stage):
    """The mean answer of the `teaching_stages` before it: of the teachers, or of the assistant."""

    name: str = "answers"

    def wanted(self, recipe: Recipe) -> bool:
        if not declared(recipe.section("distillation")) or _asked_while_training(recipe):
            return False
        return self.name == "answers" or bool(recipe.section("distillation.assistant"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        return Ingredients(
            stage="answers",
            config={key: recipe.config["trainer"][key] for key in ("threads", "accelerator")},
            parents={"data": keys["data"], **{name: keys[name] for name in teaching_stages(keys)}},
            sources=sources("hasten.stages.answers"),
            libraries=libraries("torch"),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        rows = read(inputs["data"]).rows("train").inputs
        threads, accelerator = (recipe.config["trainer"][key] for key in ("threads", "accelerator"))
        with reproducible(recipe.config["seed"], threads, accelerator):
            models = (rebuild(inputs[name]) for name in teaching_stages(inputs))
            given = [predict(model, rows, _BATCH, accelerator) for model in models]
            answers = mean_answer([torch.from_numpy(outputs) for outputs in given])
        np.save(folder / _OUTPUTS, answers.numpy(), allow_pickle=False)


def teacher_outputs(folder: Path) -> NDArray[np.float32]:
    """Answers for the training rows (N, *output_shape), mapped from the file: a batch reads its own rows of it."""
    # Copy on write: torch takes no arrays that are read-only without a warning, and nothing ever writes here.
    outputs: NDArray[np.float32] = np.load(folder / _OUTPUTS, mmap_mode="c", allow_pickle=False)
    return outputs


def _asked_while_training(recipe: Recipe) -> bool:
    """Whether rows change at random, or the loss looks at layers, so that outputs from before are not enough."""
    return bool(recipe.section("data")["augment"]) or any(
        construct(recipe.section("distillation"), "distillation").layers
    )
