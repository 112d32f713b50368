"""What `distributed=auto` stands for: the layout that fits into memory and is expected to take the least time.

Nothing is trained for that, and the models are looked at as fake tensors: a few passes of one process are timed, and
the way between two processes, where the user does not declare it. The choice is kept in the store, for a recipe that
is run again has to be the same again.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.artefacts.module import build
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_json
from hasten.core.memory import anonymous_bytes, free_bytes
from hasten.core.processor import num_cores
from hasten.core.recipe import Recipe
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.core.source import libraries
from hasten.core.store import Ingredients, Store
from hasten.core.tensor_plan import TensorPlan
from hasten.data.prepare import Prepared, read
from hasten.distributed.footprint import Footprint, PerRow, deepened
from hasten.distributed.layouts import Layout, Weighed, layouts
from hasten.distributed.link import Link, measured
from hasten.distributed.memory import Memory, needed, work
from hasten.distributed.timing import Speeds, StepTime, step_time
from hasten.evidence.latency import measuring_alone
from hasten.hardware.machine import machine_id
from hasten.hardware.probe import Roofline
from hasten.stages.data import Data, task
from hasten.stages.roofline import roofline
from hasten.stages.stage import Tools, sources
from hasten.stages.training import training_config
from hasten.training.cache import size_bytes
from hasten.training.estimate import calculation, low_rank_seconds
from hasten.training.footprint import footprint
from hasten.training.step import scaled

LINK, LAYOUTS = "link.json", "layouts.json"
DEPTHS = ("num_layers", "num_blocks")
"""Arguments of architectures that say how often blocks are repeated."""
DEEP = 8
"""Depth from which on a model is not looked at itself, but those with two and four blocks are."""
_UPDATE_BYTES = 28
"""That AdamW reads and writes for each float32 weight: it, its gradient and two states, three of which are new."""

Edit = Callable[[Sequence[str]], Recipe]
Refusals = Callable[[Recipe], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """What was chosen, and from what.

    Attributes:
        weighed: every layout, in the order of their expected times; those that can't be taken come last.
        notes: how it was weighed, one sentence each.
    """

    weighed: tuple[Weighed, ...]
    notes: tuple[str, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        return self.weighed[0].overrides

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": list(self.overrides),
            "layouts": [each.to_dict() for each in self.weighed],
            "notes": self.notes,
        }


def choose(
    recipe: Recipe, typed: Sequence[str], store: Store, *, edit: Edit, refusals: Refusals, keep: bool
) -> Layouts:
    """Weighs every layout that the recipe may have.

    Args:
        recipe: with `distributed=auto`.
        typed: names of knobs of the group `distributed` that the user typed; they stay as they are.
        edit: the recipe with some overrides on top.
        refusals: why a recipe makes no sense as a combination.
        keep: false leaves nothing in the store.

    Raises:
        ConfigError: no layout fits; with the smallest need and the limit.
        HastenError: the model can't be looked at, or the link not be measured.
    """
    with _rows(recipe, store, keep=keep) as prepared:
        ingredients = _ingredients(recipe, typed, prepared)

        def make(folder: Path) -> None:
            scale = Scale(recipe=recipe, typed=tuple(typed), prepared=prepared, store=store, keep=keep)
            weighed = tuple(scale.weighed(edit, refusals))
            write_json(folder / LAYOUTS, {"layouts": [each.to_dict() for each in weighed], "notes": [*scale.notes()]})

        if keep:
            found = read_json(store.build(ingredients, make).folder / LAYOUTS)
        elif entry := store.find(ingredients.stage, ingredients.key):
            found = read_json(entry.folder / LAYOUTS)
        else:
            with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
                make(Path(scratch))
                found = read_json(Path(scratch) / LAYOUTS)
    limit = Distributed.of(recipe.config["distributed"]).memory_limit_mb
    every = [_limited(Weighed.from_dict(each), limit) for each in found["layouts"]]
    every.sort(key=lambda each: (bool(each.refused), each.seconds if each.seconds is not None else math.inf))
    choice = Layouts(weighed=tuple(every), notes=tuple(found["notes"]))
    if every[0].refused:
        raise ConfigError(_nothing(every))
    return choice


def _limited(weighed: Weighed, limit_mb: float | None) -> Weighed:
    """Refused where it needs more than it may have, which is not the same at every time."""
    free = free_bytes() if limit_mb is None else None
    limit = 1e6 * limit_mb if limit_mb is not None else None if free is None else free / weighed.devices
    if weighed.process_bytes is None or limit is None or weighed.process_bytes <= limit:
        return weighed
    source = "free for each process" if limit_mb is None else "distributed.memory_limit_mb"
    need = f"needs {weighed.process_bytes / 1e6:.0f} MB in a process"
    return replace(weighed, refused=f"it {need}, and {limit / 1e6:.0f} MB is {source}")


def _nothing(every: Sequence[Weighed]) -> str:
    """Why none can be taken."""
    large = [each for each in every if each.process_bytes is not None]
    if not large:
        return f"distributed=auto finds nothing that can be taken: {every[0].layout}: {every[0].refused}"
    least = min(large, key=lambda each: each.process_bytes or 0.0)
    return f"distributed=auto finds nothing that fits: the least is {least.layout}: {least.refused}"


@contextmanager
def _rows(recipe: Recipe, store: Store, *, keep: bool) -> Iterator[Prepared]:
    stage = Data()
    ingredients = stage.ingredients(recipe, {})
    entry = store.find(ingredients.stage, ingredients.key)
    if entry is not None or keep:
        entry = entry or store.build(ingredients, lambda folder: stage.make(recipe, {}, folder, Tools()))
        yield read(entry.folder)
        return
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        stage.make(recipe, {}, Path(scratch), Tools())
        yield read(Path(scratch))


def _ingredients(recipe: Recipe, typed: Sequence[str], prepared: Prepared) -> Ingredients:
    spread = {name: value for name, value in recipe.config["distributed"].items() if name != "memory_limit_mb"}
    return Ingredients(
        stage="layout",
        config={
            "distributed": spread,
            "typed": sorted(typed),
            "cores": num_cores(),
            "loader": recipe.section("loader")["cache"],
            # Of these it is said which layouts they can't be combined with.
            **{name: recipe.section(name) for name in ("distillation", "pruning", "quantization")},
            **{
                name: {
                    "arch": recipe.section(name)["arch"],
                    "plan": [*(recipe.section(name).get("tensor_plan") or {}).items()],
                    **{key: value for key, value in _training(recipe, name).items() if key != "distributed"},
                }
                for name in trainings(recipe)
            },
        },
        parents={"data": prepared.fingerprint},
        sources=sources("hasten.stages.layout"),
        libraries=libraries("torch"),
        machine={"id": machine_id()},
    )


def _training(recipe: Recipe, section: str) -> dict[str, Any]:
    """As of `stages.training`, which knows no layout that is still to be chosen."""
    alone = {**recipe.config["distributed"], "kind": "single", "devices": 1, "pipeline": 1, "shards": 1, "tensor": 1}
    return training_config(Recipe(overrides=(), config={**recipe.config, "distributed": alone}), section)


def trainings(recipe: Recipe) -> tuple[str, ...]:
    """Sections with an architecture that is trained."""
    names = ("model", "student")
    return tuple(
        name for name in names if recipe.section(name).get("arch") and recipe.section(name)["training"]["epochs"] > 0
    )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Weighs layouts of one recipe."""

    recipe: Recipe
    typed: tuple[str, ...]
    prepared: Prepared
    store: Store
    keep: bool

    @cached_property
    def auto(self) -> Distributed:
        return Distributed.of(self.recipe.config["distributed"])

    @cached_property
    def threads(self) -> int:
        return int(self.recipe.config["trainer"]["threads"])

    @cached_property
    def devices(self) -> int:
        return self.auto.devices or max(1, num_cores() // self.threads)

    @cached_property
    def process_bytes(self) -> float:
        """What a process has before it has a model: about what this one has, and the rows where they are in memory."""
        cache = self.recipe.section("loader")["cache"]
        rows = size_bytes(self.prepared.kept("train")) if cache in ("auto", "memory") else 0
        free = free_bytes()
        if cache == "auto" and free is not None and rows > free / 4:
            rows = 0
        return float(anonymous_bytes(os.getpid()) + rows)

    def weighed(self, edit: Edit, refusals: Refusals) -> Iterator[Weighed]:
        """Each layout with what is expected of it."""
        base = self.process_bytes  # before models are made here
        models = [Model(scale=self, section=name) for name in trainings(self.recipe)]
        if not models:
            raise ConfigError("distributed=auto has no training to spread: distributed=single")
        micro_batches = Step.of(self.recipe.config["trainer"]).micro_batches
        said = {name: self.recipe.config["distributed"][name] for name in self.typed if name not in ("kind", "devices")}
        for layout in layouts(self.auto, self.devices, self.typed, micro_batches=micro_batches):
            overrides = layout.overrides(said, micro_batches)
            told = Weighed(layout=layout.told, overrides=overrides, devices=layout.spread.devices)
            try:
                problems = list(refusals(edit(overrides)))
                problems += [problem for model in models if (problem := model.problem(layout))]
                if problems:
                    raise ConfigError(problems[0])
                yield self._weigh(told, layout, models, base)
            except ConfigError as error:
                yield replace(told, refused=str(error))

    def _weigh(self, told: Weighed, layout: Layout, models: Sequence[Model], base: float) -> Weighed:
        need = base + max(model.memory(layout).peak for model in models)
        times = [model.time(layout) for model in models]
        slowest = max(times, key=lambda each: each.seconds)
        return Weighed(
            layout=told.layout,
            overrides=told.overrides,
            devices=told.devices,
            process_bytes=need,
            step_ms=1e3 * slowest.seconds,
            parts_ms={name: 1e3 * value for name, value in asdict(slowest).items()},
            seconds=sum(model.num_steps * time.seconds for model, time in zip(models, times, strict=True)),
        )

    @cached_property
    def link(self) -> Link:
        if self.auto.bandwidth_mbit is not None:
            return Link.declared(self.auto.bandwidth_mbit)
        ingredients = Ingredients(
            stage="link",
            config={},
            sources=sources("hasten.distributed.link"),
            libraries=libraries("torch"),
            machine={"id": machine_id()},
        )

        def make(folder: Path) -> None:
            with measuring_alone():
                write_json(folder / LINK, measured().to_dict())

        if self.keep:
            return Link(**read_json(self.store.build(ingredients, make).folder / LINK))
        entry = self.store.find(ingredients.stage, ingredients.key)
        return measured() if entry is None else Link(**read_json(entry.folder / LINK))

    def notes(self) -> Iterator[str]:
        yield f"Processes are {self.devices}, of {self.threads} threads each, on {num_cores()} cores."
        if self.devices > 1:
            source = "declared" if self.auto.bandwidth_mbit is not None else "measured"
            rate = 8 * self.link.bytes_per_second / 1e6
            latency = 1e3 * self.link.latency_seconds
            yield f"Between two processes: {rate:.0f} Mbit/s, {latency:.2g} ms a message ({source})."


@dataclass(frozen=True, kw_only=True)
class Model:
    """One training of the recipe, as far as it is weighed."""

    scale: Scale
    section: str

    @cached_property
    def node(self) -> Mapping[str, Any]:
        return self.scale.recipe.section(self.section)

    @cached_property
    def plan(self) -> TensorPlan:
        return TensorPlan.of(self.scale.recipe.config, self.section)

    @cached_property
    def step(self) -> Step:
        return Step.of(self.scale.recipe.config["trainer"])

    @cached_property
    def settings(self) -> TrainingSettings:
        """With the rows of a whole step."""
        settings = TrainingSettings(**self.node["training"])
        return scaled(settings, self.step, self.scale.prepared.num_rows["train"])

    @property
    def num_steps(self) -> int:
        return self.settings.epochs * max(1, self.scale.prepared.num_rows["train"] // self.settings.batch_size)

    def problem(self, layout: Layout) -> str | None:
        """Why it can't be trained like that, as far as the rules of combinations don't tell."""
        spread, rows = layout.spread, self.settings.batch_size
        shape = spread.mesh(spread.devices)
        if rows < shape.data * layout.micro_batches:
            return f"{self.section}.training.batch_size={rows} has no row for each process and micro-batch"
        if shape.pipeline > 1 and rows % (shape.data * layout.micro_batches):
            return f"{self.section}.training.batch_size={rows} can't be divided into equal micro-batches"
        if shape.pipeline > 1 and self.settings.patience is not None:
            return f"{self.section}.training.patience needs the whole model to judge held-out rows"
        if layout.micro_batches != self.step.micro_batches and self.compares_rows:
            return "batch normalization sees each micro-batch alone: trainer.micro_batches allows it"
        if shape.tensor > 1 and (problems := [*self.plan.problems(tensor=shape.tensor, sequence_parallel=False)]):
            return problems[0]
        return None

    @cached_property
    def compares_rows(self) -> bool:
        from torch.nn.modules.batchnorm import _BatchNorm

        return any(isinstance(module, _BatchNorm) for module in self.model.modules())

    @cached_property
    def model(self) -> nn.Module:
        """Of fake tensors, for a look at its modules."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.made(self.node["arch"])

    def made(self, arch: Mapping[str, Any]) -> nn.Module:
        prepared = self.scale.prepared
        key, seed = f"{self.section}.arch", self.scale.recipe.config["seed"]
        return build(arch, prepared.inputs, prepared.output_shape, seed=seed, facts=prepared.facts, key=key)[0]

    def footprint(self, tensor: int, *, alone: bool) -> Footprint:
        """As one process calculates it."""
        known = self._footprints
        alone = alone or not self.compares_rows
        if (tensor, alone) not in known:
            known[tensor, alone] = self._looked_at(tensor, alone=alone)
        return known[tensor, alone]

    @cached_property
    def _footprints(self) -> dict[tuple[int, bool], Footprint]:
        return {}

    def _looked_at(self, tensor: int, *, alone: bool) -> Footprint:
        arch = self.node["arch"]
        knob = next((name for name in DEPTHS if isinstance(arch.get(name), int)), None)
        if knob and arch[knob] > DEEP:
            two, four = (self._look({**arch, knob: depth}, tensor, alone=alone) for depth in (2, 4))
            try:
                return deepened(two, four, arch[knob])
            except HastenError:  # blocks are not alike, so that all of them have to be looked at
                pass
        return self._look(arch, tensor, alone=alone)

    def _look(self, arch: Mapping[str, Any], tensor: int, *, alone: bool) -> Footprint:
        prepared, rows = self.scale.prepared, self.settings.batch_size
        kept = prepared.kept("train")
        few = max(2, rows // (2 * self.scale.devices))
        return footprint(
            lambda: self.made(arch),
            prepared.inputs,
            torch.from_numpy(kept.targets[:1].copy()),
            task(self.scale.recipe),
            self.step,
            rows=(few, max(few + 1, rows)),
            alone=alone,
            plan=self.plan,
            tensor=tensor,
        )

    def memory(self, layout: Layout) -> Memory:
        shape = layout.spread.mesh(layout.spread.devices)
        own = self.footprint(shape.tensor, alone=shape.data == 1)
        return needed(own, layout.spread, self.settings.batch_size, self._parts(layout))

    def time(self, layout: Layout) -> StepTime:
        spread = layout.spread
        shape = spread.mesh(spread.devices)
        whole, own = self.footprint(1, alone=True), self.footprint(shape.tensor, alone=shape.data == 1)
        passes, update = self.calculation
        speeds = Speeds(
            passes=passes,
            update=update,
            link=self.scale.link if spread.devices > 1 else Link.declared(1e6),
            crowding=max(1.0, spread.devices * self.scale.threads / num_cores()),
            low_rank=self.low_rank(spread.powersgd_rank) if spread.compression == "powersgd" else 0.0,
        )
        return step_time(whole, own, spread, self.settings.batch_size, self._parts(layout), speeds)

    def _parts(self, layout: Layout) -> Step:
        return Step.of({**self.scale.recipe.config["trainer"], "micro_batches": layout.micro_batches})

    def low_rank(self, rank: int) -> float:
        found = self.footprint(1, alone=True).weights
        matrices = [(weight.rows, weight.columns) for weight in found if weight.columns and weight.trained]
        return low_rank_seconds(matrices, rank, self.scale.threads)

    @cached_property
    def calculation(self) -> tuple[PerRow, float]:
        """Seconds of a pass and of an update: measured where the model fits, else from the roofline of the machine."""
        whole, free = self.footprint(1, alone=True), free_bytes()
        rows = self.scale.prepared.rows("train", limit=self.settings.batch_size)
        room = 4 * whole.weight_bytes + whole.saved_bytes(len(rows))
        if free is None or room < free / 2:
            with measuring_alone():
                model = self.made(self.node["arch"])
                return calculation(
                    model, rows, task=task(self.scale.recipe), step=self.step, threads=self.scale.threads
                )
        found = Roofline.from_dict(roofline(self.scale.store, self.scale.threads, "cpu"))
        peak = 1e9 * found.peak_gops["float32"]
        one, two = (sum(work(part, number) for part in whole.parts) / peak for number in (1, 2))
        update = _UPDATE_BYTES / 4 * whole.trained_bytes / (1e9 * found.bandwidth_gbs["DRAM"])
        return PerRow.through((1, one), (2, two)), update
