"""The engine of a recipe as it is compiled: where several devices share a model, with the engines of those devices."""

from __future__ import annotations

from typing import Any

from hasten.core.construct import locate
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Target
from hasten.core.recipe import Composer, Recipe
from hasten.core.source import libraries
from hasten.engines.placed import Placed
from hasten.stages.stage import sources


def is_placed(recipe: Recipe) -> bool:
    """Whether the recipe's engine divides a model between devices."""
    engine = locate(recipe.section("engine")["_target_"], "engine")
    return isinstance(engine, type) and issubclass(engine, Placed)


def engine_node(recipe: Recipe) -> dict[str, Any]:
    """The engine's section. In the place of a device's option stands the node of that engine, on the device's CPUs.

    Raises:
        ConfigError: a device names an engine that there is not, or one that has devices itself.
    """
    node = dict(recipe.section("engine"))
    if not is_placed(recipe):
        return node
    devices = Target.of(recipe.section("target")).devices
    return {
        **node,
        "between": [
            {"name": it.name, "cpus": list(it.cpus), "engine": _on(it.engine, len(it.cpus), place, recipe)}
            for place, it in enumerate(devices)
        ],
    }


def _on(option: str, num_cpus: int, place: int, recipe: Recipe) -> dict[str, Any]:
    """The node of an engine with as many threads as its device has CPUs."""
    try:
        node = dict(Composer(base=(), walk=()).node("engine", option, recipe))
    except ConfigError as error:
        raise ConfigError(f"target.devices[{place}].engine: {error}") from error
    engine = locate(node["_target_"], f"target.devices[{place}].engine")
    if isinstance(engine, type) and issubclass(engine, Placed):
        raise ConfigError(f"target.devices[{place}].engine={option} needs devices itself: name what runs on this one")
    return {**node, "threads": num_cpus} if "threads" in node else node


def engines(recipe: Recipe) -> list[str]:
    """Dotted paths of all engine classes that take part."""
    node = engine_node(recipe)
    parts = [str(device["engine"]["_target_"]) for device in node["between"]] if is_placed(recipe) else []
    return list(dict.fromkeys([str(node["_target_"]), *parts]))


def engine_sources(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the code of all engines that take part."""
    placed = ("hasten.stages.placing", "hasten.engines.device") if is_placed(recipe) else ()
    return sources(*engines(recipe), *placed)


def engine_libraries(recipe: Recipe) -> dict[str, str]:
    """Versions of the libraries of all engines that take part."""
    placed = ("onnx", "onnxruntime") if is_placed(recipe) else ()
    return libraries(*(name for each in engines(recipe) for name in locate(each, "engine").libraries), *placed)


def engine_family(recipe: Recipe) -> str:
    """Whose fusions the quantize/dequantize pairs have to follow; that of the first device where there are several."""
    own, *parts = engines(recipe)
    return str(locate((parts or [own])[0], "engine").family)
