"""How fast models that are not yet in the store would be on the target, for passes that choose by it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import output_shape, rebuild, resized, save, surgery
from hasten.core.construct import arguments, construct, locate
from hasten.core.files import read_json
from hasten.core.interfaces import Graph, GraphPass, Target
from hasten.core.recipe import Recipe
from hasten.core.source import libraries
from hasten.data.prepare import Prepared
from hasten.evidence import latency
from hasten.evidence.process import Worker
from hasten.evidence.requests import request_of
from hasten.hardware.machine import machine_id
from hasten.stages.engine import engine_family, engine_libraries, engine_node, engine_sources
from hasten.stages.stage import declared, sources

if TYPE_CHECKING:
    import torch

REFERENCE_ROWS = 8
CALIBRATION_ROWS = 32
"""Ranges decide what a model gives, not how long it takes."""
PARTICIPANTS = 16
"""Models that are timed in one session, each in a process of its own; more than that go into the next one, in which
the first of them takes part again, so that sessions can be held against each other."""
BRIEFLY = latency.LatencyProtocol(min_rounds=10, max_rounds=20, precision=0.02)


def rehearsal_ingredients(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], dict[str, str], dict[str, str]]:
    """Config, sources, libraries and machine that a stage depends on whose pass times models on the target."""
    quantization = recipe.section("quantization")
    target = {key: recipe.section("target")[key] for key in ("device", "threads", "batch_size", "length")}
    config = {"engine": engine_node(recipe), "target": target}
    code = {**sources("hasten.stages.rehearsal"), **engine_sources(recipe)}
    versions = {**libraries("torch", "onnx", "onnxscript"), **engine_libraries(recipe)}
    if _is_quantized(recipe):
        config["quantization"] = arguments(quantization)
        code |= sources(quantization["_target_"])
        versions |= libraries("torchao", "onnxruntime", "openvino")  # any of them may place it, whatever the engine
    return config, code, versions, {"id": machine_id()}


def rehearsed(recipe: Recipe) -> str:
    """What is timed, in a sentence for the report; of all that the recipe says, it depends on the ingredients alone."""
    engine = f"engine={recipe.option('engine')}"
    if _is_quantized(recipe):
        return f"These latencies are those of {engine} with quantization={recipe.option('quantization')}."
    return f"These latencies are those of {engine} in floats: quantization that trains or times layers is not in them."


def _is_quantized(recipe: Recipe) -> bool:
    """Whether the quantization takes part: what trains or times layers would do so for every network that is timed."""
    node = recipe.section("quantization")
    return declared(node) and issubclass(locate(node["_target_"], "quantization"), GraphPass)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Deploys models as the recipe would and times them in turns.

    Attributes:
        module: artefact whose constructor and surgery every timed model shares, up to the sizes of its layers.
    """

    recipe: Recipe
    prepared: Prepared
    module: Path

    def models(self, models: Sequence[torch.nn.Module]) -> list[float]:
        """Milliseconds (p50) of a request of each; `core.interfaces.Bench.latencies_ms`."""
        with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
            graphs = []
            for number, model in enumerate(models):
                graph = self._exported(model, Path(scratch) / str(number))
                graphs.append(self._quantized(graph, Path(scratch) / str(number)))
            return self.graphs(graphs)

    def graphs(self, graphs: Sequence[Graph]) -> list[float]:
        """Milliseconds (p50) of a request of each; `core.interfaces.Bench.graph_latencies_ms`."""
        with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
            folders = [Path(scratch) / str(number) for number in range(len(graphs))]
            with Worker.of(self._target) as worker:
                for graph, folder in zip(graphs, folders, strict=True):
                    folder.mkdir()
                    worker.compile(engine_node(self.recipe), graph, folder)
            return self._timed(folders)

    def _timed(self, folders: Sequence[Path]) -> list[float]:
        """The first folder takes part in every session; what a session differs by is taken out with it."""
        first, *others = folders
        rows = self.prepared.rows("train", limit=self._target.batch_size).inputs
        request = request_of(rows, self.prepared.inputs, self._target.request)
        anchor, found = None, []
        for start in range(0, max(1, len(others)), PARTICIPANTS - 1):
            part = others[start : start + PARTICIPANTS - 1]
            measured = latency.measure(
                first,
                {folder.name: folder for folder in part},
                self._target,
                request,
                BRIEFLY,
                self.recipe.config["seed"],
            )
            p50 = {name: latency.latency_ms(measured, 0.95, name)["p50"].value for name in measured.blocks_us}
            anchor = anchor or p50[latency.CANDIDATE]
            found += [p50[folder.name] * anchor / p50[latency.CANDIDATE] for folder in part]
        assert anchor is not None
        return [anchor, *found]

    @property
    def _target(self) -> Target:
        node: Mapping[str, Any] = self.recipe.section("target")
        return Target.of(node)

    def _exported(self, model: torch.nn.Module, folder: Path) -> Graph:
        module, graph = folder / "module", folder / "graph"
        for path in (module, graph):
            path.mkdir(parents=True)
        step = {"technique": "rehearsal", "resized": resized(rebuild(self.module), model)}
        save(module, read_json(self.module / "module.json")["arch"], model, [*surgery(self.module), step])
        rows = self.prepared.rows("train", limit=REFERENCE_ROWS).inputs
        signature = self.prepared.signature(output_shape(model, self.prepared.inputs))
        return write_graph(model, module, signature, rows, graph)

    def _quantized(self, graph: Graph, folder: Path) -> Graph:
        """With the recipe's quantization, where it takes part."""
        if not _is_quantized(self.recipe):
            return graph
        method: GraphPass = construct(self.recipe.section("quantization"), "quantization")
        placed = folder / "quantized"
        placed.mkdir()
        family = engine_family(self.recipe)
        rows = self.prepared.rows("train", limit=min(method.calibration_rows, CALIBRATION_ROWS)).inputs
        method(graph, rows if method.calibration_rows else {}, family, placed)
        return replace(graph, onnx=placed / "model.onnx", quantized=True)
