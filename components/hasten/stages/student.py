"""The student stage: a smaller architecture trained in the model's place, distilled where the recipe declares it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.module import build, save
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, sources
from hasten.stages.training import LIBRARIES, StageBench, distillation_ingredients, training_config


class Student(Stage):
    name = "student"

    def wanted(self, recipe: Recipe) -> bool:
        return bool(recipe.section("student").get("arch"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("student")
        config, parents, code = distillation_ingredients(recipe, keys)
        return Ingredients(
            stage=self.name,
            config={"arch": node["arch"], **training_config(recipe, "student"), **config},
            parents={"data": keys["data"], **parents},
            sources={**sources("hasten.stages.student", node["arch"]["_target_"]), **code},
            libraries=libraries(*LIBRARIES),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        prepared = read(inputs["data"])
        node, seed = recipe.section("student"), recipe.config["seed"]
        model, arch = build(node["arch"], prepared.input_shape, prepared.num_classes, seed=seed, key="student.arch")
        bench = StageBench(recipe=recipe, section="student", what="student", inputs=inputs, folder=folder, tools=tools)
        save(folder, arch, bench.fit(model))
