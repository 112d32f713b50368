"""The data stage: rows from their source, split, with statistics of the training rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hasten.core.construct import arguments, construct
from hasten.core.errors import ConfigError
from hasten.core.files import write_text
from hasten.core.interfaces import DataSource, Task, Transform
from hasten.core.recipe import Recipe
from hasten.core.sections import Metric
from hasten.core.store import Ingredients
from hasten.data import prepare
from hasten.stages.stage import Stage, Tools, folder_digest, sources

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin")
"""Files beside a tokenizer that no transform reads."""
COLUMNS = "columns.json"
"""Shape of a row of each of the source's columns in their order, or `text` or `bytes`."""

_fingerprints: dict[DataSource, str] = {}


class Data(Stage):
    name = "data"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("data")
        folders = [folder_digest(each, without=WEIGHTS) for each in node["transforms"]]
        return Ingredients(
            stage=self.name,
            config={
                "split": node["split"],
                "normalize": node["normalize"],
                "transforms": node["transforms"],
                "task": arguments(recipe.section("task")),
                "seed": recipe.config["seed"],
                **({"folders": folders} if any(folders) else {}),
            },
            data=fingerprint(source(recipe)),
            sources=sources(
                "hasten.stages.data",
                node["_target_"],
                recipe.section("task")["_target_"],
                *(each["_target_"] for each in node["transforms"]),
            ),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node = recipe.section("data")
        rows = source(recipe)
        stream = rows.stream()
        for note in stream.notes:
            log.warning("%s", note)
        prepare.write(
            folder,
            stream,
            task=task(recipe),
            transforms=transforms(recipe),
            shares=node["split"],
            normalize=node["normalize"],
            seed=recipe.config["seed"],
            source=fingerprint(rows),
            progress=tools.progress,
        )
        shapes = {name: _row_shape(values) for name, values in next(stream.pieces()).items()}
        write_text(folder / COLUMNS, json.dumps(shapes, indent=1) + "\n")


def _row_shape(values: NDArray[Any]) -> list[int] | str:
    if values.dtype == object:
        return "text" if isinstance(values[0], str) else "bytes"
    return list(values.shape[1:])


def task(recipe: Recipe) -> Task:
    """What the recipe's outputs mean."""
    made = construct(recipe.section("task"), "task")
    if not isinstance(made, Task):
        raise ConfigError(f"task._target_={recipe.section('task')['_target_']} is no Task")
    return made


def metrics(recipe: Recipe) -> tuple[Metric, ...]:
    """How well the task is done; the first decides what is told first, and null leaves one out."""
    nodes = recipe.section("task")["metrics"]
    return tuple(Metric(name=name, target=node["_target_"], **arguments(node)) for name, node in nodes.items() if node)


def transforms(recipe: Recipe) -> list[Transform]:
    """The declared transforms, not fitted."""
    made = []
    for place, node in enumerate(recipe.section("data")["transforms"]):
        transform = construct(node, f"data.transforms[{place}]")
        if not isinstance(transform, Transform):
            raise ConfigError(f"data.transforms[{place}]._target_={node['_target_']} is no Transform")
        made.append(transform)
    return made


def source(recipe: Recipe) -> DataSource:
    """The rows' source that the recipe declares."""
    made = construct(recipe.section("data"), "data")
    if not isinstance(made, DataSource):
        raise ConfigError(f"data._target_={recipe.section('data')['_target_']} is no DataSource")
    return made


def fingerprint(rows: DataSource) -> str:
    """Of the source's content, read once per session."""
    if rows not in _fingerprints:
        _fingerprints[rows] = rows.fingerprint()
    return _fingerprints[rows]


def forget_fingerprints() -> None:
    """A new session reads the rows anew: in a notebook the file may have changed since the last."""
    _fingerprints.clear()
