"""The export stage: the float module captured once as a graph that every engine reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import output_shape, rebuild
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, module_stage, sources
from hasten.training.determinism import reproducible

REFERENCE_ROWS = 64
"""Training rows whose eager outputs every float engine is held against."""


class Export(Stage):
    name = "export"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        return Ingredients(
            stage=self.name,
            config={"reference_rows": REFERENCE_ROWS},
            parents={"data": keys["data"], "module": keys[module_stage(keys)]},
            sources=sources("hasten.stages.export"),
            libraries=libraries("torch", "onnx", "onnxscript"),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        prepared = read(inputs["data"])
        folder_of_module = inputs[module_stage(inputs)]
        rows = prepared.rows("train", limit=REFERENCE_ROWS).inputs
        module = rebuild(folder_of_module)
        signature = prepared.signature(output_shape(module, prepared.inputs))
        # The sum of floats depends on the threads; the reference outputs must not depend on the machine's default.
        with reproducible(recipe.config["seed"], threads=1):
            write_graph(module, folder_of_module, signature, rows, folder)
