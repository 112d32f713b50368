"""The compile stage: the graph as its engine runs it on the target, made in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.artefacts.capture import read_graph
from hasten.artefacts.deployed import deployable_bytes
from hasten.core.construct import locate
from hasten.core.files import write_json
from hasten.core.interfaces import Graph, Target
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.core.store import Ingredients
from hasten.evidence.process import Worker
from hasten.hardware.machine import machine_id
from hasten.stages.stage import Stage, Tools, graph_stage, module_stage, sources, write_notes
from hasten.stages.tuning import BUDGET, tuned

COMPILED = "compiled.json"
SEARCHING = ("hasten.stages.tuning", "hasten.evidence.latency", "hasten.evidence.worker")


class Compile(Stage):
    name = "compile"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("engine")
        engine = locate(node["_target_"], "engine")
        searches = bool(node.get(BUDGET))
        return Ingredients(
            stage=self.name,
            config={"engine": dict(node), **(_searched(recipe) if searches else {})},
            parents={"module": keys[module_stage(keys)], "graph": keys[graph_stage(keys)]},
            sources=sources("hasten.stages.compile", node["_target_"], *(SEARCHING if searches else ())),
            libraries=libraries(*engine.libraries),
            machine={"id": machine_id()},
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node, told = recipe.section("engine"), list[str]()
        graph = self._graph(inputs)
        if node.get(BUDGET):
            found = tuned(node, graph, Target.of(recipe.section("target")), recipe.config["seed"])
            node, told = found.node, [found.told()]
        with Worker(threads=recipe.config["target"]["threads"]) as worker:
            worker.compile(node, graph, folder)
            share = worker.integer_share(folder) if graph.quantized else None
            write_notes(folder, (*told, *worker.notes(folder)))
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
