"""What a stage is: ingredients that make its key, and the work that writes its folder."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.core.files import digest, file_digest, read_json, write_json
from hasten.core.interfaces import Progress, Silent
from hasten.core.recipe import Recipe
from hasten.core.source import source_fingerprint
from hasten.core.store import Ingredients

NOTES = "notes.json"


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What stages may use and no key depends on."""

    progress: Progress = field(default_factory=Silent)
    checkpoint_seconds: float = 5.0


class Stage(abc.ABC):
    """One step of a recipe. Knows its key's ingredients; knows nothing of tracking or of the loop."""

    name: str
    """Unique within a recipe. In the store, stages that make the same kind of thing lie together."""

    @abc.abstractmethod
    def wanted(self, recipe: Recipe) -> bool:
        """Whether the recipe has this stage."""

    @abc.abstractmethod
    def ingredients(self, recipe: Recipe, keys: Mapping[str, str]) -> Ingredients:
        """What decides the result.

        Args:
            keys: stage name -> key of the stages before this one that the recipe has.
        """

    @abc.abstractmethod
    def make(self, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, tools: Tools) -> None:
        """Writes the artefact.

        Args:
            inputs: stage name -> folder of the finished stages before this one.
            folder: where to write; `resume` below it survives a kill.
        """


def module_stage(present: Mapping[str, Any]) -> str:
    """Which of the stages before holds the float module that goes on."""
    return next(name for name in ("prune", "student", "teacher") if name in present)


def teaching_stages(present: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of the stages before teach what is trained next: the assistant once there is one, else all teachers."""
    if "assistant" in present:
        return ("assistant",)
    return tuple(name for name in present if name.partition("-")[0] == "teacher")


def answers_stage(present: Mapping[str, Any]) -> str | None:
    """Which of the stages before holds the answers of the `teaching_stages`; None where they have to be asked."""
    name = "assistant-answers" if "assistant" in present else "answers"
    return name if name in present else None


def graph_stage(present: Mapping[str, Any]) -> str:
    """Which of the stages before holds the graph that is compiled."""
    return next(name for name in ("quantize", "export") if name in present)


def sources(*targets: str) -> dict[str, str]:
    """Fingerprint of the code behind each dotted path."""
    return {target: source_fingerprint(target) for target in targets}


def folder_digest(node: Mapping[str, Any], without: tuple[str, ...] = ()) -> str | None:
    """Of the files in the `folder` that a component is to read; None where it names none.

    Args:
        without: endings of names that do not count.
    """
    folder = node.get("folder")
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return None
    files = sorted(file for file in Path(folder).iterdir() if file.is_file() and not file.name.endswith(without))
    return digest({file.name: file_digest(file) for file in files})


def add_notes(folder: Path, notes: Sequence[str]) -> None:
    """Keeps beside the artefact what the report should say of it, after what it is to say already."""
    if notes:
        write_json(folder / NOTES, list(dict.fromkeys((*read_notes(folder), *notes))))


def read_notes(folder: Path) -> tuple[str, ...]:
    """What `add_notes` kept."""
    file = folder / NOTES
    return tuple(read_json(file)) if file.is_file() else ()


def declared(node: Mapping[str, Any]) -> bool:
    """Whether an optional group holds a component, that is, anything but `none`."""
    return bool(node.get("_target_"))
