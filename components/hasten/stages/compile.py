"""The compile stage: the graph as its engine runs it on the target, made in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.artefacts.capture import read_graph
from hasten.artefacts.deployed import deployable_bytes
from hasten.core.files import write_json
from hasten.core.interfaces import Graph, Target
from hasten.core.recipe import Recipe
from hasten.core.store import Ingredients
from hasten.evidence.process import Worker
from hasten.hardware.machine import machine_id
from hasten.stages.engine import engine_libraries, engine_node, engine_sources, is_placed
from hasten.stages.placing import place
from hasten.stages.stage import Stage, Tools, add_notes, graph_stage, module_stage, sources
from hasten.stages.tuning import BUDGET, tuned

COMPILED = "compiled.json"
SEARCHING = ("hasten.stages.tuning", "hasten.evidence.latency", "hasten.evidence.worker")


class Compile(Stage):
    name = "compile"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        config: dict[str, Any] = {"engine": engine_node(recipe)}
        searches = bool(recipe.section("engine").get(BUDGET))
        if is_placed(recipe):  # what it does is chosen by timing requests
            target = {name: value for name, value in recipe.section("target").items() if name != "engines"}
            config |= {"target": target, "seed": recipe.config["seed"]}
        elif searches:
            config |= _searched(recipe)
        return Ingredients(
            stage=self.name,
            config=config,
            parents={"module": keys[module_stage(keys)], "graph": keys[graph_stage(keys)]},
            sources={
                **sources("hasten.stages.compile", *(SEARCHING if searches else ())),
                **engine_sources(recipe),
            },
            libraries=engine_libraries(recipe),
            machine={"id": machine_id()},
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node: Mapping[str, Any] = engine_node(recipe)
        graph, target, told = self._graph(inputs), Target.of(recipe.section("target")), tuple[str, ...]()
        if node.get(BUDGET) and not is_placed(recipe):
            found = tuned(node, graph, target, recipe.config["seed"])
            node, told = found.node, (found.told(),)
        with Worker.of(target) as worker:
            if is_placed(recipe):
                told = place(graph, node, target, recipe.config["seed"], folder, tools.progress)
            else:
                worker.compile(node, graph, folder)
            share = worker.integer_share(folder) if graph.quantized else None
            add_notes(folder, (*told, *worker.notes(folder)))
        write_json(folder / COMPILED, {"integer_share": share, "size_bytes": deployable_bytes(folder)})

    def _graph(self, inputs: Mapping[str, Path]) -> Graph:
        graph = read_graph(inputs["export"], inputs[module_stage(inputs)])
        if "quantize" in inputs:
            return replace(graph, onnx=inputs["quantize"] / "model.onnx", quantized=True)
        return graph


def _searched(recipe: Recipe) -> dict[str, Any]:
    """What the measured search of settings depends on, beside the engine and the graph."""
    target = recipe.section("target")
    return {"seed": recipe.config["seed"], "target": {key: target[key] for key in ("device", "threads", "batch_size")}}
