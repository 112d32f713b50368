"""The student stage: a smaller architecture trained in the model's place, distilled where the recipe declares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Student(Stage):
    """What is to run; or an assistant, which learns in the same way and then teaches (Mirzadeh et al. 2020).

    Attributes:
        section: of the config, with `arch`, `checkpoint` and `training`.
    """

    name: str = "student"
    section: str = "student"

    def wanted(self, recipe: Recipe) -> bool:
        return bool(recipe.section(self.section).get("arch"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section(self.section)
        config, parents, code = distillation_ingredients(recipe, keys)
        return Ingredients(
            stage="student",
            config={
                "arch": node["arch"],
                "initial_seed": _initial_seed(recipe, node),
                **checkpoint_config(node),
                **training_config(recipe, self.section),
                **config,
            },
            parents={"data": keys["data"], **parents},
            data=weights_digest(node),
            sources={**training_sources(recipe, "hasten.stages.student", node["arch"]["_target_"]), **code},
            libraries=libraries(*LIBRARIES),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        prepared = read(inputs["data"])
        node, section = recipe.section(self.section), self.section
        # The teacher's outputs, which the task may not know, are what a student has to give.
        shape = prepared.output_shape or output_shape(rebuild(inputs["teacher"]), prepared.inputs)
        seed, key = _initial_seed(recipe, node), f"{section}.arch"
        model, arch = build(node["arch"], prepared.inputs, shape, seed=seed, facts=prepared.facts, key=key)
        if node["checkpoint"]:
            load_weights(model, Path(node["checkpoint"]), f"{section}.checkpoint", node["checkpoint_keys"])
        bench = StageBench(recipe=recipe, section=section, what=self.name, inputs=inputs, folder=folder, tools=tools)
        save(folder, arch, bench.fit(model))


def _initial_seed(recipe: Recipe, node: Mapping[str, Any]) -> int:
    """Of the weights that the training starts from.

    With the model's own architecture and seed they would be those that the model itself started from, and with one of
    the next seeds those of a further teacher; a model that is born again starts anew (Furlanello et al. 2018).
    """
    again = node["arch"] == recipe.section("model")["arch"]
    return int((recipe.config["seed"] + again * recipe.section("distillation").get("teachers", 1)) % 2**32)
