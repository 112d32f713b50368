"""The answers stage: what the teacher gives for the training rows, computed once for all that is distilled from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.artefacts.module import rebuild
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, declared, sources
from hasten.training.determinism import reproducible
from hasten.training.predict import predict

_OUTPUTS = "outputs.safetensors"
_BATCH = 256


class Answers(Stage):
    name = "answers"

    def wanted(self, recipe: Recipe) -> bool:
        """Rows that are changed at random have no stored answer: the teacher is asked while the student trains."""
        return declared(recipe.section("distillation")) and not recipe.section("data")["augment"]

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        return Ingredients(
            stage=self.name,
            config={"threads": recipe.config["trainer"]["threads"]},
            parents={"data": keys["data"], "teacher": keys["teacher"]},
            sources=sources("hasten.stages.answers"),
            libraries=libraries("torch"),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        from safetensors.numpy import save_file

        rows = read(inputs["data"]).rows("train").inputs
        with reproducible(recipe.config["seed"], recipe.config["trainer"]["threads"]):
            outputs = predict(rebuild(inputs["teacher"]), rows, batch_size=_BATCH)
        save_file({"outputs": outputs}, folder / _OUTPUTS)


def teacher_outputs(folder: Path) -> Any:
    """Outputs of the teacher on the training rows (N, *output_shape)."""
    from safetensors.numpy import load_file

    return load_file(folder / _OUTPUTS)["outputs"]
