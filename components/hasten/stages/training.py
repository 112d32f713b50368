"""What the stages that train have in common: settings, the distillation loss, the bench lent to passes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artefacts.module import rebuild
from hasten.core.construct import arguments, construct
from hasten.core.errors import ConfigError
from hasten.core.files import digest, file_digest, read_json, write_json
from hasten.core.interfaces import Augment, Distillation, Graph, Rows, Task
from hasten.core.recipe import Recipe
from hasten.core.sections import Distributed, Loader, Step, TrainingSettings
from hasten.core.tensor_plan import TensorPlan
from hasten.data.prepare import Prepared, read
from hasten.stages.answers import teacher_outputs
from hasten.stages.data import source, task
from hasten.stages.group import train
from hasten.stages.rehearsal import Rehearsal, rehearsal_ingredients
from hasten.stages.stage import (
    Tools,
    add_notes,
    answers_stage,
    declared,
    folder_digest,
    module_stage,
    sources,
    teaching_stages,
)
from hasten.training.cache import resolved
from hasten.training.fit import Fitted, fit

if TYPE_CHECKING:
    import pytorch_lightning as pl
    import torch

    from hasten.distributed.group import Group
    from hasten.training.step_clock import StepClock

CURVES = "curves.json"
LIBRARIES = ("torch", "pytorch-lightning")


def checkpoint_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """How the weights of a checkpoint are named; as pairs, for the replacements are applied in their order."""
    return {"checkpoint_keys": list(node["checkpoint_keys"].items()) if node["checkpoint"] else None}


def weights_digest(node: Mapping[str, Any]) -> str | None:
    """Of the files that bring trained weights: a checkpoint, and a folder that the architecture is read from."""
    folder = folder_digest(node["arch"])
    if not node["checkpoint"]:
        return folder
    checkpoint = file_digest(Path(node["checkpoint"]))
    return checkpoint if folder is None else digest([checkpoint, folder])


def training_config(recipe: Recipe, section: str) -> dict[str, Any]:
    """The part of a training stage's config that decides its result."""
    node = recipe.section(section).get("training")
    settings = TrainingSettings(**node) if node else None  # a pass that only measures has none
    if settings and settings.patience is None:
        settings = replace(settings, held_out=TrainingSettings.held_out)  # then nothing is held out
    return {
        "training": asdict(settings) if settings else None,
        "seed": recipe.config["seed"],
        "threads": recipe.config["trainer"]["threads"],
        "accelerator": recipe.config["trainer"]["accelerator"],
        "step": asdict(Step.of(recipe.config["trainer"])),
        **_spread_config(recipe, section),
        "order": order_config(loader(recipe)),
        "task": arguments(recipe.section("task")),
        "augment": recipe.section("data")["augment"],
    }


def _spread_config(recipe: Recipe, section: str) -> dict[str, Any]:
    """How the training is spread over processes; nothing where one trains."""
    spread = Distributed.of(recipe.config["distributed"])
    if spread.kind == "single":
        return {}
    plan = TensorPlan.of(recipe.config, section)
    divided = {"tensor_plan": list(plan.layers.items())} if spread.mesh(spread.devices).tensor > 1 else {}
    return {"distributed": spread.result, **divided}


def loader(recipe: Recipe) -> Loader:
    return Loader(**recipe.section("loader"))


def order_config(loader: Loader) -> dict[str, Any]:
    """What decides the order of rows. The size that `auto` goes by is the data's, whose key is in the stage's key."""
    names = {"rows": (), "blocks": ("block_rows", "window_blocks")}.get(
        loader.order, ("block_rows", "window_blocks", "blocks_above_mb")
    )
    return {"order": loader.order, **{name: getattr(loader, name) for name in names}}


def training_rows(recipe: Recipe, prepared: Prepared) -> tuple[Rows, Loader]:
    """The rows to train on as the recipe's loader reads them, and the loader with its order settled."""
    section, kept = loader(recipe), prepared.kept("train")
    rows = prepared.raw("train", source(recipe)) if section.cache == "none" else kept
    return rows, resolved(section, kept)


def training_sources(recipe: Recipe, *targets: str) -> dict[str, str]:
    """Fingerprints of the code behind a training stage: its own, the task's, and what changes the rows at random."""
    augment = recipe.section("data")["augment"]
    return sources(*targets, recipe.section("task")["_target_"], *(node["_target_"] for node in augment))


def distillation_ingredients(
    recipe: Recipe, keys: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Config, parents and sources that a declared distillation adds to a stage that trains after the teacher."""
    node = recipe.section("distillation")
    if not declared(node):
        return {}, {}, {}
    answers = answers_stage(keys)
    taught_by = (answers,) if answers else teaching_stages(keys)
    config = {"_target_": node["_target_"], **arguments(node)}
    return {"distillation": config}, {name: keys[name] for name in taught_by}, sources(node["_target_"])


def timing_ingredients(
    recipe: Recipe, section: str
) -> tuple[dict[str, Any], dict[str, str], dict[str, str], dict[str, str]]:
    """Config, sources, libraries and machine that a pass adds to its stage where it times models on the target."""
    if not getattr(construct(recipe.section(section), section), "measures", False):
        return {}, {}, {}, {}
    return rehearsal_ingredients(recipe)


@dataclass(frozen=True, kw_only=True)
class StageBench:
    """`core.interfaces.Bench` for one stage of one recipe; keeps the curves of what it trained, one after the other.

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
    _trainings: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    @property
    def seed(self) -> int:
        return int(self.recipe.config["seed"])

    @property
    def train(self) -> Rows:
        return read(self.inputs["data"]).rows("train")

    @property
    def task(self) -> Task:
        return task(self.recipe)

    def latencies_ms(self, models: Sequence[torch.nn.Module]) -> list[float]:
        return self._rehearsal.models(models)

    def graph_latencies_ms(self, graphs: Sequence[Graph]) -> list[float]:
        return self._rehearsal.graphs(graphs)

    @property
    def _rehearsal(self) -> Rehearsal:
        module = self.inputs[module_stage(self.inputs)]
        return Rehearsal(recipe=self.recipe, prepared=read(self.inputs["data"]), module=module)

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.trained(model, distil=True).model

    def trained(
        self,
        model: torch.nn.Module,
        *,
        distil: bool,
        steps: int | None = None,
        clock: StepClock | None = None,
        callbacks: Sequence[pl.Callback] = (),
    ) -> Fitted:
        """Trains a copy as the stage's `training` section says and adds its curves to those beside the artefact.

        Args:
            steps: in place of the section's epochs.
            clock, callbacks: as of `training.fit.fit`.
        """
        number = next(self._trainings)
        # Of its own, so that a pass that trains in rounds does not begin anew with the first when it was killed in the
        # last.
        resume = self.folder / (f"resume{number}" if number else "resume")
        spread = Distributed.of(self.recipe.config["distributed"])
        if spread.kind == "single":
            fitted = self.fitted(model, distil=distil, resume=resume, steps=steps, clock=clock, callbacks=callbacks)
        else:
            fitted = self._spread(model, spread, distil=distil, resume=resume)
        self._add_curves(fitted.curves)
        add_notes(self.folder, [*fitted.notes, *self._told(fitted)])
        return fitted

    def _spread(self, model: torch.nn.Module, spread: Distributed, *, distil: bool, resume: Path) -> Fitted:
        """Trains a copy in several processes."""
        node = self.recipe.section(self.section)["training"]
        trained = copy.deepcopy(model)
        if node["epochs"] == 0:
            return Fitted(model=trained.eval(), curves={})
        job = {
            "recipe": self.recipe.config,
            "section": self.section,
            "what": self.what,
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            "folder": str(self.folder),
            "resume": str(resume),
            "checkpoint_seconds": self.tools.checkpoint_seconds,
            "distil": distil,
        }
        threads = self.recipe.config["trainer"]["threads"]
        found = train(trained, job, spread, threads=threads, what=self.what, progress=self.tools.progress)
        return Fitted(model=trained.eval(), curves=found["curves"], cache=found["cache"], notes=tuple(found["notes"]))

    def fitted(
        self,
        model: torch.nn.Module,
        *,
        distil: bool,
        resume: Path,
        steps: int | None = None,
        clock: StepClock | None = None,
        callbacks: Sequence[pl.Callback] = (),
        group: Group | None = None,
    ) -> Fitted:
        """Trains a copy in this process, and keeps nothing of it but checkpoints.

        Args:
            resume: folder of the checkpoints.
            group: as of `training.fit.fit`.
        """
        node = self.recipe.section("distillation")
        loss, outputs, answers = None, None, None
        teachers: list[torch.nn.Module] = []
        if distil and declared(node):
            loss = construct(node, "distillation")
            assert isinstance(loss, Distillation)
            # There are no stored answers where they would not do (`stages.answers`): the teachers are asked again.
            answers = answers_stage(self.inputs)
            if answers:
                outputs = teacher_outputs(self.inputs[answers])
            else:
                teachers = [rebuild(self.inputs[name]) for name in teaching_stages(self.inputs)]
        rows, settled = training_rows(self.recipe, read(self.inputs["data"]))
        return fit(
            model,
            rows,
            TrainingSettings(**self.recipe.section(self.section)["training"]),
            task=task(self.recipe),
            augment=augmentation(self.recipe),
            step=Step.of(self.recipe.config["trainer"]),
            teachers=teachers,
            seed=self.seed,
            threads=self.recipe.config["trainer"]["threads"],
            accelerator=self.recipe.config["trainer"]["accelerator"],
            folder=resume,
            checkpoint_seconds=self.tools.checkpoint_seconds,
            progress=self.tools.progress,
            what=self.what,
            key=f"{self.section}.training",
            loss=loss,
            teacher_outputs=outputs,
            steps=steps,
            clock=clock,
            callbacks=callbacks,
            loader=settled,
            # Folders of the store are called by their keys.
            contents=" ".join(self.inputs[name].name for name in ("data", answers) if name),
            group=group,
            plan=TensorPlan.of(self.recipe.config, self.section),
        )

    def _told(self, fitted: Fitted) -> Iterator[str]:
        """What storage delivered, one sentence for each epoch."""
        # Where rows are mapped from files it matters what storage delivered; elsewhere it is read once.
        readings = fitted.readings if fitted.reads_storage else ()
        first = len(next(iter(fitted.curves.values()), [])) - len(readings) + 1  # of a resumed training not the first
        return (f"{self.what}, epoch {epoch}: {each.told}." for epoch, each in enumerate(readings, first) if each.told)

    def _add_curves(self, curves: Mapping[str, Sequence[float]]) -> None:
        file = self.folder / CURVES
        earlier = read_json(file) if file.exists() else {}
        write_json(file, {name: [*earlier.get(name, []), *values] for name, values in curves.items()})


def augmentation(recipe: Recipe) -> tuple[Augment, ...]:
    """The declared random changes of training rows."""
    made = []
    for place, node in enumerate(recipe.section("data")["augment"]):
        change = construct(node, f"data.augment[{place}]")
        if not isinstance(change, Augment):
            raise ConfigError(f"data.augment[{place}]._target_={node['_target_']} is no Augment")
        made.append(change)
    return tuple(made)
