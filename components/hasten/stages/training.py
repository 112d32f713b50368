"""What the stages that train have in common: settings, the distillation loss, the bench lent to passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.core.construct import construct
from hasten.core.files import write_json
from hasten.core.interfaces import Distillation, Rows
from hasten.core.recipe import Recipe
from hasten.core.sections import TrainingSettings
from hasten.data.prepare import read
from hasten.stages.stage import Tools, declared, sources
from hasten.training.fit import Fitted, fit

if TYPE_CHECKING:
    import torch

CURVES = "curves.json"
LOGITS = "train_logits.safetensors"
LIBRARIES = ("torch", "pytorch-lightning")


def training_config(recipe: Recipe, section: str) -> dict[str, Any]:
    """The part of a training stage's config that decides its result."""
    return {
        "training": recipe.section(section)["training"],
        "seed": recipe.config["seed"],
        "threads": recipe.config["trainer"]["threads"],
    }


def distillation_ingredients(
    recipe: Recipe, keys: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Config, parents and sources that a declared distillation adds to a stage that trains after the teacher."""
    node = recipe.section("distillation")
    if not declared(node):
        return {}, {}, {}
    return {"distillation": dict(node)}, {"teacher": keys["teacher"]}, sources(node["_target_"])


@dataclass(frozen=True, kw_only=True)
class StageBench:
    """`core.interfaces.Bench` for one stage of one recipe; keeps the curves of what it trained.

    Attributes:
        section: of the config, whose `training` node says how.
        what: is trained, as progress and errors call it.
    """

    recipe: Recipe
    section: str
    what: str
    inputs: Mapping[str, Path]
    folder: Path
    tools: Tools

    @property
    def seed(self) -> int:
        return int(self.recipe.config["seed"])

    @property
    def train(self) -> Rows:
        return read(self.inputs["data"]).rows("train")

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.trained(model, distil=True).model

    def trained(self, model: torch.nn.Module, *, distil: bool) -> Fitted:
        """Trains a copy as the stage's `training` section says and writes its curves beside the artefact."""
        node = self.recipe.section("distillation")
        loss, outputs = None, None
        if distil and declared(node):
            loss = construct(node, "distillation")
            assert isinstance(loss, Distillation)
            outputs = teacher_logits(self.inputs["teacher"])
        fitted = fit(
            model,
            self.train,
            TrainingSettings(**self.recipe.section(self.section)["training"]),
            seed=self.seed,
            threads=self.recipe.config["trainer"]["threads"],
            folder=self.folder / "resume",
            checkpoint_seconds=self.tools.checkpoint_seconds,
            progress=self.tools.progress,
            what=self.what,
            key=f"{self.section}.training",
            loss=loss,
            teacher_outputs=outputs,
        )
        write_json(self.folder / CURVES, fitted.curves)
        return fitted


def teacher_logits(folder: Path) -> Any:
    """Outputs of the teacher on the training rows (N, C), computed once when the teacher was made."""
    from safetensors.numpy import load_file

    return load_file(folder / LOGITS)["logits"]
