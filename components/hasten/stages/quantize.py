"""The quantize stage: integer arithmetic placed in the graph for the engine that will run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hasten.artefacts.capture import read_graph
from hasten.artefacts.rows import take
from hasten.core.construct import arguments, construct, locate
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, GraphPass, TrainedGraphPass
from hasten.core.processor import has_vnni
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.data.prepare import read
from hasten.stages.engine import engine_family
from hasten.stages.stage import Stage, Tools, add_notes, declared, module_stage, sources
from hasten.stages.training import (
    LIBRARIES,
    StageBench,
    distillation_ingredients,
    timing_ingredients,
    training_config,
    training_sources,
)
from hasten.training.determinism import reproducible


def refusal(recipe: Recipe, export: Path, module: Path) -> str | None:
    """Why the recipe's graph pass can't do enough to this float graph, known before it is tried; else None.

    Args:
        export: folder of the export stage.
        module: folder of the module that it exported.
    """
    node = recipe.section("quantization")
    wanted = node.get("min_integer_share", 0.0)
    if not wanted or not issubclass(locate(node["_target_"], "quantization"), GraphPass):
        return None
    share = construct(node, "quantization").integer_share(read_graph(export, module))
    if share >= wanted:
        return None
    at_least = f"{wanted:.0%} wanted (quantization.min_integer_share)"
    return f"only {share:.0%} of the convolutions and linear layers can run in integers, {at_least}"


class Quantize(Stage):
    name = "quantize"

    def wanted(self, recipe: Recipe) -> bool:
        return declared(recipe.section("quantization"))

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("quantization")
        trained = issubclass(locate(node["_target_"], "quantization"), TrainedGraphPass)
        config, parents, code = distillation_ingredients(recipe, keys) if trained else ({}, {}, {})
        timing, timed_by, engine_libraries, machine = timing_ingredients(recipe, "quantization")
        if trained:
            config = {**training_config(recipe, "quantization"), **config}
            code = {**training_sources(recipe), **code}
        return Ingredients(
            stage=self.name,
            config={
                "pass": arguments(node),
                "family": engine_family(recipe),
                "seed": recipe.config["seed"],
                **config,
                **timing,
            },
            parents={"data": keys["data"], "module": keys[module_stage(keys)], "export": keys["export"], **parents},
            sources={**sources("hasten.stages.quantize", node["_target_"]), **code, **timed_by},
            libraries={
                **libraries(
                    "torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", *(LIBRARIES if trained else ())
                ),
                **engine_libraries,
            },
            machine={"vnni": has_vnni(), **machine},
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node = recipe.section("quantization")
        method = construct(node, "quantization")
        if not isinstance(method, GraphPass | TrainedGraphPass):
            raise ConfigError(f"quantization._target_={node['_target_']} is no GraphPass")
        graph = read_graph(inputs["export"], inputs[module_stage(inputs)])
        calibration: Columns = {}
        if method.calibration_rows:
            train = read(inputs["data"]).kept("train")
            order = np.random.default_rng(recipe.config["seed"]).permutation(len(train))[: method.calibration_rows]
            calibration = take(train, order).inputs
        family = engine_family(recipe)
        if isinstance(method, GraphPass):
            notes = method(graph, calibration, family, folder)
        else:
            bench = StageBench(
                recipe=recipe, section="quantization", what="quantized model", inputs=inputs, folder=folder, tools=tools
            )
            with reproducible(recipe.config["seed"], recipe.config["trainer"]["threads"]):
                notes = method(graph, calibration, family, folder, bench)
        add_notes(folder, notes)
