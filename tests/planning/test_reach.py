"""Whether the packaged strategies reach every combination of engine, number format and threads that may be the best."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hydra import initialize_config_module

from hasten.core import schema
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit
from hasten.core.preflight import check
from hasten.core.recipe import UNTOUCHED, Composer, Recipe
from hasten.core.trial import Profile, Trial
from hasten.engines import checks
from hasten.planning.bottleneck import BottleneckPlanner

MakeTrial = Callable[..., Trial]
Place = tuple[str, int]
"""Engine with its number formats, and threads."""

FORMATS = {
    ("eager", "float32", "none"): "eager",
    ("eager", "bfloat16", "none"): "eager bf16",
    ("onnxruntime", "float32", "none"): "ort",
    ("onnxruntime", "float32", "static"): "ort s8",
    ("onnxruntime", "float32", "dynamic"): "ort d8",
    ("openvino", "float32", "none"): "ov",
    ("openvino", "bfloat16", "none"): "ov bf16",
    ("openvino", "float32", "static"): "ov s8",
    ("openvino", "bfloat16", "static"): "ov s8 bf16",
}
"""Engine, precision, quantization -> how the tables call it."""

TABLES = {
    # Milliseconds with 1 and 2 threads on a Zen 5 processor.
    "residual CNN, batch 1": "ov s8 bf16 .111 .099, ov s8 .110 .103, ort s8 .140 .108, ov bf16 .156 .124, "
    "ort .260 .155, ort d8 .258 .159, ov .247 .184, eager 1.186 .979, eager bf16 1.147 1.061",
    "residual CNN, batch 32": "ov s8 bf16 2.543 1.367, ov s8 2.595 1.600, ov bf16 4.123 2.102, ort s8 4.071 2.217, "
    "ov 7.024 3.747, ort 7.975 4.053, ort d8 7.934 4.135, eager bf16 8.868 5.094, eager 11.994 6.866",
    "depthwise CNN, batch 1": "ov s8 .056 .066, ov s8 bf16 .056 .066, ort d8 .077 .061, ov bf16 .064 .062, "
    "ort .076 .071, ort s8 .086 .071, ov .088 .079, eager .724 .736, eager bf16 .964 .914",
    "depthwise CNN, batch 32": "ov s8 bf16 1.131 .660, ov s8 1.184 .665, ov bf16 1.462 .795, ort 2.203 1.147, "
    "ort d8 2.204 1.151, ov 2.367 1.183, ort s8 2.215 1.251, eager 7.535 4.482, eager bf16 8.802 4.850",
    "transformer, batch 1": "ov s8 .251 .234, ov s8 bf16 .293 .310, ov bf16 .333 .294, ov .415 .301, "
    "ort d8 .382 .357, ort .559 .445, ort s8 .500 .475, eager 1.268 1.007, eager bf16 1.206 1.096",
    "transformer, batch 32": "ov s8 6.772 3.470, ov s8 bf16 7.587 3.902, ov bf16 8.909 4.663, ort d8 11.474 5.969, "
    "ov 13.243 6.704, ort s8 15.715 8.226, eager bf16 15.445 8.958, ort 17.000 9.023, eager 29.232 17.081",
    "recurrent net, batch 1": "ov bf16 .113 .149, ov s8 bf16 .115 .136, ort d8 .164 .135, ort .167 .137, "
    "ort s8 .167 .142, ov .170 .192, ov s8 .172 .188, eager bf16 .216 .229, eager .255 .246",
    "recurrent net, batch 32": "ov s8 bf16 1.050 .704, ov bf16 .994 .710, eager bf16 1.104 .794, ort d8 1.780 .946, "
    "ort s8 1.776 .968, ov s8 1.687 .991, ort 1.765 .993, ov 1.576 1.024, eager 1.639 1.069",
}
SHARES = {
    "compute": {"compute": 0.7, "memory": 0.1, "overhead": 0.2},
    "memory": {"compute": 0.05, "memory": 0.75, "overhead": 0.2},
    "overhead": {"compute": 0.02, "memory": 0.03, "overhead": 0.95},
}
NAMED = "strategy=[bfloat16,dynamic_int8,engine,engine_threads,static_int8]"
ENGINES = ("eager", "onnxruntime", "openvino")
COMPOSERS: dict[str, Composer] = {}


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        COMPOSERS["composer"] = Composer.of(["target.threads=2", NAMED])
        yield
    COMPOSERS.clear()
    edited.cache_clear()
    refusal.cache_clear()


@pytest.fixture(autouse=True)
def _has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "has_bfloat16", lambda: True)


def read(table: str) -> dict[Place, float]:
    found = {}
    for entry in table.split(", "):
        *name, one, two = entry.split()
        found[" ".join(name), 1], found[" ".join(name), 2] = float(one), float(two)
    return found


def place(recipe: Recipe) -> Place:
    engine, quantization = recipe.section("engine"), recipe.option("quantization")
    quantization = quantization if recipe.section("quantization").get("_target_") else "none"
    precision = engine.get("precision", "float32")
    return FORMATS[recipe.option("engine"), precision, quantization], engine["threads"]


@dataclass(kw_only=True)
class Loop:
    """The loop with the packaged strategies on a machine whose every time is known."""

    trial: MakeTrial
    milliseconds: Mapping[Place, float]
    shares: Mapping[str, float]
    recipes: list[Recipe] = field(default_factory=list)
    history: list[Trial] = field(default_factory=list)

    def run(self) -> Place:
        """What it ends with."""
        composer, planner = COMPOSERS["composer"], BottleneckPlanner(max_trials=40)
        strategies = composer.strategies()
        self.recipes.append(composer.compose(UNTOUCHED))
        best = self.trial(0)
        self.history.append(best)
        lent: dict[str, Any] = {"same_recipe": self.same_recipe, "inadmissible": self.inadmissible}
        while choice := planner.choose(self.history, self.profile, strategies, best, **lent):
            assert choice.parent is not None
            recipe = self.edited(choice.parent, choice.edit)
            gain = self.time(self.recipes[best.number]) / self.time(recipe)
            made = self.trial(
                len(self.history),
                parent=choice.parent,
                edit=choice.edit,
                strategy=choice.strategy,
                verdict="accepted" if gain >= 1.02 else "rejected",
                expected_gain=choice.expected_gain,
                measured_gain=gain,
                seconds=8.0,
            )
            self.recipes.append(recipe)
            self.history.append(made)
            best = made if gain >= 1.02 else best
        return place(self.recipes[best.number])

    @property
    def profile(self) -> Profile:
        bottleneck = max(self.shares, key=lambda name: self.shares[name])
        shares = {**self.shares, "capacity": 0.0}
        return Profile(latency_ms=1.0, operators=(), shares=shares, bottleneck=bottleneck, evidence=(), weight_bytes=0)

    def time(self, recipe: Recipe) -> float:
        return self.milliseconds[place(recipe)]

    def edited(self, parent: int, edit: Edit) -> Recipe:
        return edited(self.recipes[parent].overrides, edit)

    def same_recipe(self, parent: int, edit: Edit) -> Trial | None:
        identity = self.edited(parent, edit).identity
        found = (trial for trial, recipe in zip(self.history, self.recipes, strict=True) if recipe.identity == identity)
        return next(found, None)

    def inadmissible(self, parent: int, edit: Edit) -> str | None:
        if any(text.startswith("engine=") and text.removeprefix("engine=") not in ENGINES for text in edit):
            return "not among target.engines"
        try:
            return refusal(self.edited(parent, edit).overrides)
        except ConfigError as error:
            return str(error)


@functools.cache
def edited(overrides: Edit, edit: Edit) -> Recipe:
    return COMPOSERS["composer"].edited(Recipe(overrides=overrides, config={}), edit)


@functools.cache
def refusal(overrides: Edit) -> str | None:
    try:
        check(edited(overrides, ()))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "shares",
    [pytest.param(SHARES[name], id=name, marks=[pytest.mark.drill] * (name != "compute")) for name in SHARES],
)
@pytest.mark.parametrize("network", TABLES)
def test_ends_within_five_percent_of_the_best_of_all(
    network: str, shares: Mapping[str, float], trial: MakeTrial
) -> None:
    milliseconds = read(TABLES[network])
    loop = Loop(trial=trial, milliseconds=milliseconds, shares=shares)
    chosen = loop.run()
    assert milliseconds[chosen] <= 1.05 * min(milliseconds.values()), [
        (each.edit, each.verdict) for each in loop.history
    ]
    assert len(loop.history) <= 25


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(5))
def test_also_on_other_machines(seed: int, trial: MakeTrial) -> None:
    """Where each engine, format and thread speeds up by another factor, so that any of them may be the best."""
    draw = random.Random(seed)

    def factor(spread: float) -> float:
        return draw.uniform(1, spread)

    fewer = factor(1.9)
    speeds = {"eager": 1.0, "ort": factor(6), "ov": factor(6), "s8": factor(3), "d8": factor(2), "bf16": factor(2.5)}
    milliseconds = {}
    for name in FORMATS.values():
        speed = 1.0
        for part in name.split():
            speed *= speeds[part]
        milliseconds[name, 1] = 1 / speed
        milliseconds[name, 2] = 1 / speed / (fewer if draw.random() < 0.7 else 1 / fewer)
    for shares in SHARES.values():
        chosen = Loop(trial=trial, milliseconds=milliseconds, shares=shares).run()
        assert milliseconds[chosen] <= 1.05 * min(milliseconds.values())
