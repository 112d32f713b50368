"""The quantize stage: integer arithmetic placed in the graph for the engine that will run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hasten.artefacts.capture import read_graph
from hasten.core.construct import arguments, construct, locate
from hasten.core.errors import ConfigError
from hasten.core.interfaces import GraphPass
from hasten.core.processor import has_vnni
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.stage import Stage, Tools, declared, module_stage, sources


class Quantize(Stage):
    name = "quantize"

    def wanted(self, recipe: Recipe) -> bool:
        return declared(recipe.section("quantization"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("quantization")
        return Ingredients(
            stage=self.name,
            config={"pass": arguments(node), "family": self._family(recipe), "seed": recipe.config["seed"]},
            parents={"data": keys["data"], "module": keys[module_stage(keys)], "export": keys["export"]},
            sources=sources("hasten.stages.quantize", node["_target_"]),
            libraries=libraries("torch", "torchao", "onnx", "onnxscript", "onnxruntime"),
            machine={"vnni": has_vnni()},
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node = recipe.section("quantization")
        method = construct(node, "quantization")
        if not isinstance(method, GraphPass):
            raise ConfigError(f"quantization._target_={node['_target_']} is no GraphPass")
        graph = read_graph(inputs["export"], inputs[module_stage(inputs)])
        calibration = {}
        if method.calibration_rows:
            train = read(inputs["data"]).rows("train")
            order = np.random.default_rng(recipe.config["seed"]).permutation(len(train))[: method.calibration_rows]
            calibration = {name: values[order] for name, values in train.inputs.items()}
        method(graph, calibration, self._family(recipe), folder)

    def _family(self, recipe: Recipe) -> str:
        return str(locate(recipe.section("engine")["_target_"], "engine").family)
