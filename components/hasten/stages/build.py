"""The walk through one recipe: which stages it has, their keys, and their artefacts, built or found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hasten.core.recipe import Recipe
from hasten.core.store import Entry, Store
from hasten.stages.answers import Answers
from hasten.stages.compile import Compile
from hasten.stages.data import Data
from hasten.stages.export import Export
from hasten.stages.prune import Prune
from hasten.stages.quantize import Quantize
from hasten.stages.stage import Stage, Tools, module_stage
from hasten.stages.student import Student
from hasten.stages.teacher import teachers

TAUGHT: Sequence[Stage] = (
    Answers(),
    Student(name="assistant", section="distillation.assistant"),
    Answers(name="assistant-answers"),
    Student(),
)
"""The way from the teachers to the student, over a teacher assistant where there is one."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage of a recipe before it is built. `entry` is what the store already has."""

    stage: Stage
    key: str
    entry: Entry | None


@dataclass(frozen=True, kw_only=True)
class Built:
    """A recipe with all its stages finished."""

    recipe: Recipe
    entries: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def compiled(self) -> Entry:
        return self.entries["compile"]

    @property
    def module(self) -> Entry:
        return self.entries[module_stage(self.entries)]

    @property
    def data(self) -> Entry:
        return self.entries["data"]

    @property
    def keys(self) -> dict[str, str]:
        return {name: entry.key for name, entry in self.entries.items()}


def plan(recipe: Recipe, store: Store) -> list[Planned]:
    """The recipe's stages in order, with their keys; builds nothing.

    Raises:
        ConfigError: the data can't be read.
    """
    keys: dict[str, str] = {}
    planned = []
    for stage in wanted(recipe):
        ingredients = stage.ingredients(recipe, keys)
        keys[stage.name] = ingredients.key
        entry = store.find(ingredients.stage, ingredients.key)
        planned.append(Planned(stage=stage, key=ingredients.key, entry=entry))
    return planned


def build(recipe: Recipe, store: Store, tools: Tools, *, on_stage: Callable[[str], None] = lambda name: None) -> Built:
    """Finds or builds every stage of the recipe.

    Args:
        on_stage: told the name of each stage that has to be built, before it is.

    Raises:
        HastenError: what a stage refused; finished stages before it stay in the store.
    """
    entries: dict[str, Entry] = {}
    for stage in wanted(recipe):
        inputs = {name: entry.folder for name, entry in entries.items()}
        ingredients = stage.ingredients(recipe, {name: entry.key for name, entry in entries.items()})
        if store.find(ingredients.stage, ingredients.key) is None:
            on_stage(stage.name)
        entries[stage.name] = store.build(ingredients, _making(stage, recipe, inputs, tools))
    return Built(recipe=recipe, entries=entries)


def wanted(recipe: Recipe) -> list[Stage]:
    """The stages that the recipe has. The teacher is always there, even where no stage reads it: it is the baseline."""
    stages = [Data(), *teachers(recipe), *TAUGHT, Prune(), Export(), Quantize(), Compile()]
    return [stage for stage in stages if stage.wanted(recipe)]


def _making(stage: Stage, recipe: Recipe, inputs: Mapping[str, Path], tools: Tools) -> Callable[[Path], None]:
    return lambda folder: stage.make(recipe, inputs, folder, tools)
