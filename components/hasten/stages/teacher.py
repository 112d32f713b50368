"""The teacher stage: the user's model, trained or loaded, and its outputs on the training rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.module import build, load_weights, save
from hasten.core.files import file_digest
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, sources
from hasten.stages.training import LIBRARIES, LOGITS, StageBench, training_config
from hasten.training.determinism import reproducible
from hasten.training.predict import predict


class Teacher(Stage):
    name = "teacher"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("model")
        return Ingredients(
            stage=self.name,
            config={"arch": node["arch"], **training_config(recipe, "model")},
            parents={"data": keys["data"]},
            data=file_digest(Path(node["checkpoint"])) if node["checkpoint"] else None,
            sources=sources("hasten.stages.teacher", node["arch"]["_target_"]),
            libraries=libraries(*LIBRARIES),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        from safetensors.numpy import save_file

        node = recipe.section("model")
        prepared = read(inputs["data"])
        model, arch = build(node["arch"], prepared.input_shape, prepared.num_classes, seed=recipe.config["seed"])
        if node["checkpoint"]:
            load_weights(model, Path(node["checkpoint"]))
        bench = StageBench(recipe=recipe, section="model", what="teacher", inputs=inputs, folder=folder, tools=tools)
        if node["training"]["epochs"] > 0:
            model = bench.trained(model, distil=False).model
        save(folder, arch, model)
        with reproducible(recipe.config["seed"], recipe.config["trainer"]["threads"]):
            logits = predict(model, prepared.rows("train").inputs, batch_size=256)
        save_file({"logits": logits}, folder / LOGITS)
