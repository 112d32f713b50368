"""The teacher stage: the user's model, trained, loaded, or loaded and trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.module import build, load_weights, save
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools
from hasten.stages.training import (
    LIBRARIES,
    StageBench,
    checkpoint_config,
    training_config,
    training_sources,
    weights_digest,
)


class Teacher(Stage):
    name = "teacher"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("model")
        return Ingredients(
            stage=self.name,
            config={
                "arch": node["arch"],
                **checkpoint_config(node),
                **training_config(recipe, "model"),
            },
            parents={"data": keys["data"]},
            data=weights_digest(node),
            sources=training_sources(recipe, "hasten.stages.teacher", node["arch"]["_target_"]),
            libraries=libraries(*LIBRARIES),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node = recipe.section("model")
        prepared = read(inputs["data"])
        seed = recipe.config["seed"]
        model, arch = build(node["arch"], prepared.inputs, prepared.output_shape, seed=seed, facts=prepared.facts)
        if node["checkpoint"]:
            load_weights(model, Path(node["checkpoint"]), mapping=node["checkpoint_keys"])
        bench = StageBench(recipe=recipe, section="model", what="teacher", inputs=inputs, folder=folder, tools=tools)
        if node["training"]["epochs"] > 0:
            model = bench.trained(model, distil=False).model
        save(folder, arch, model)
