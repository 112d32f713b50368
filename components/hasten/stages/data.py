"""The data stage: rows from their source, split, with statistics of the training rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.core.construct import construct
from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource
from hasten.core.recipe import Recipe
from hasten.core.store import Ingredients
from hasten.data import prepare
from hasten.stages.stage import Stage, Tools, sources

_fingerprints: dict[DataSource, str] = {}


class Data(Stage):
    name = "data"

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        node = recipe.section("data")
        return Ingredients(
            stage=self.name,
            config={"split": node["split"], "normalize": node["normalize"], "seed": recipe.config["seed"]},
            data=fingerprint(source(recipe)),
            sources=sources("hasten.stages.data", node["_target_"]),
        )

    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        node = recipe.section("data")
        rows = source(recipe)
        prepare.write(
            folder,
            rows.load(),
            shares=node["split"],
            normalize=node["normalize"],
            seed=recipe.config["seed"],
            source=fingerprint(rows),
        )


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
