"""The teacher stage: the user's model, trained, loaded, or loaded and trained on; and others that teach beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artefacts.module import build, load_weights, save
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import Prepared, read
from hasten.stages.stage import Stage, Tools
from hasten.stages.training import (
    LIBRARIES,
    StageBench,
    checkpoint_config,
    training_config,
    training_sources,
    weights_digest,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Teacher(Stage):
    """The first teacher is the user's model, and the baseline whatever is made of it.

    Attributes:
        seed_offset: added to the recipe's seed, which decides initial weights and the order of batches.
        checkpoint: weights that are taken as they are, in place of those that the recipe declares; None for those.
    """

    name: str = "teacher"
    seed_offset: int = 0
    checkpoint: str | None = None

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        recipe = self._own(recipe)
        node = recipe.section("model")
        return Ingredients(
            stage="teacher",
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
        recipe = self._own(recipe)
        node = recipe.section("model")
        prepared = read(inputs["data"])
        model, arch = untrained(recipe, prepared)
        bench = StageBench(recipe=recipe, section="model", what=self.name, inputs=inputs, folder=folder, tools=tools)
        if node["training"]["epochs"] > 0:
            model = bench.trained(model, distil=False).model
        save(folder, arch, model)

    def _own(self, recipe: Recipe) -> Recipe:
        """The recipe that has this teacher for its model."""
        node: Mapping[str, Any] = recipe.section("model")
        if self.checkpoint:
            node = {**node, "checkpoint": self.checkpoint, "training": {**node["training"], "epochs": 0}}
        seed = (recipe.config["seed"] + self.seed_offset) % 2**32
        return replace(recipe, config={**recipe.config, "model": node, "seed": seed})


def untrained(recipe: Recipe, prepared: Prepared) -> tuple[nn.Module, dict[str, Any]]:
    """The user's model before hasten trains it, with the weights that it brings along, and its `arch` filled in."""
    node, seed = recipe.section("model"), recipe.config["seed"]
    model, arch = build(node["arch"], prepared.inputs, prepared.output_shape, seed=seed, facts=prepared.facts)
    if node["checkpoint"]:
        load_weights(model, Path(node["checkpoint"]), mapping=node["checkpoint_keys"])
    return model, arch


def teachers(recipe: Recipe) -> tuple[Teacher, ...]:
    """The user's model, and those that a distillation declares beside it: trained from other seeds, or loaded."""
    node = recipe.section("distillation")
    seeds = range(1, node.get("teachers", 1))
    others = [Teacher(name=f"teacher-{offset + 1}", seed_offset=offset) for offset in seeds]
    for checkpoint in node.get("checkpoints", ()):
        others.append(Teacher(name=f"teacher-{len(others) + 2}", checkpoint=checkpoint))
    return (Teacher(), *others)
