"""The prune stage: parts of the module removed, the rest fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.module import rebuild, save, surgery
from hasten.core.construct import arguments, construct
from hasten.core.errors import ConfigError
from hasten.core.files import read_json
from hasten.core.interfaces import ModulePass
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.stages.rehearsal import rehearsed
from hasten.stages.stage import Stage, Tools, add_notes, declared, module_stage
from hasten.stages.training import (
    LIBRARIES,
    StageBench,
    distillation_ingredients,
    timing_ingredients,
    training_config,
    training_sources,
)
from hasten.training.determinism import reproducible


class Prune(Stage):
    name = "prune"

    def wanted(self, recipe: Recipe) -> bool:
        return declared(recipe.section("pruning"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("pruning")
        config, parents, code = distillation_ingredients(recipe, keys)
        timing, timed_by, engine_libraries, machine = timing_ingredients(recipe, "pruning")
        return Ingredients(
            stage=self.name,
            config={"pass": arguments(node), **training_config(recipe, "pruning"), **config, **timing},
            parents={"data": keys["data"], "module": keys[module_stage(keys)], **parents},
            sources={**training_sources(recipe, "hasten.stages.prune", node["_target_"]), **code, **timed_by},
            libraries={**libraries(*LIBRARIES, "torch-pruning"), **engine_libraries},
            machine=machine,
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        method = construct(recipe.section("pruning"), "pruning")
        if not isinstance(method, ModulePass):
            raise ConfigError(f"pruning._target_={recipe.section('pruning')['_target_']} is no ModulePass")
        before = inputs[module_stage(inputs)]
        bench = StageBench(
            recipe=recipe, section="pruning", what="pruned model", inputs=inputs, folder=folder, tools=tools
        )
        with reproducible(recipe.config["seed"], recipe.config["trainer"]["threads"]):
            cut = method(rebuild(before), bench)
        arch = read_json(before / "module.json")["arch"]
        save(folder, arch, cut.model, [*surgery(before), *cut.steps])
        add_notes(folder, [*cut.notes, rehearsed(recipe)] if method.measures else cut.notes)
