"""The student stage: a smaller architecture trained in the model's place, distilled where the recipe declares it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.module import build, load_weights, output_shape, rebuild, save
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools
from hasten.stages.training import (
    LIBRARIES,
    StageBench,
    checkpoint_config,
    distillation_ingredients,
    training_config,
    training_sources,
    weights_digest,
)


class Student(Stage):
    name = "student"

    def wanted(self, recipe: Recipe) -> bool:
        return bool(recipe.section("student").get("arch"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("student")
        config, parents, code = distillation_ingredients(recipe, keys)
        return Ingredients(
            stage=self.name,
            config={"arch": node["arch"], **checkpoint_config(node), **training_config(recipe, "student"), **config},
            parents={"data": keys["data"], **parents},
            data=weights_digest(node),
            sources={**training_sources(recipe, "hasten.stages.student", node["arch"]["_target_"]), **code},
            libraries=libraries(*LIBRARIES),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        prepared = read(inputs["data"])
        node, seed = recipe.section("student"), recipe.config["seed"]
        # The teacher's outputs, which the task may not know, are what a student has to give.
        shape = prepared.output_shape or output_shape(rebuild(inputs["teacher"]), prepared.inputs)
        model, arch = build(node["arch"], prepared.inputs, shape, seed=seed, facts=prepared.facts, key="student.arch")
        if node["checkpoint"]:
            load_weights(model, Path(node["checkpoint"]), "student.checkpoint", node["checkpoint_keys"])
        bench = StageBench(recipe=recipe, section="student", what="student", inputs=inputs, folder=folder, tools=tools)
        save(folder, arch, bench.fit(model))
