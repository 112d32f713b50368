"""The measured search of an engine's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hasten.core.files import read_json
from hasten.core.interfaces import Target
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.core.trial import Interval
from hasten.stages.build import build
from hasten.stages.stage import Tools, read_notes
from hasten.stages.tuning import search, variants

TARGET = Target(device="cpu", threads=2, batch_size=32, engines=("onnxruntime",))
ORT = {
    "_target_": "hasten.engines.onnxruntime.OnnxRuntime",
    "threads": 2,
    "static_batch": None,
    "graph_optimization": "all",
    "mapped": False,
    "compressed": False,
    "search_seconds": 20,
}
GIVEN = {"threads": 2, "layout": "rows", "level": "all"}
SETTINGS = {"threads": (1,), "layout": ("columns", "tiles"), "level": ("none", "some")}


class Machine:
    """Requests whose time is known, and a clock that goes on by the same for each comparison."""

    def __init__(self, milliseconds: Mapping[str, Mapping[Any, float]], *, uncertainty: float = 0.01) -> None:
        self.milliseconds = milliseconds
        self.uncertainty = uncertainty
        self.now = 0.0
        self.compared: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def compare(self, base: Mapping[str, Any], variant: Mapping[str, Any]) -> Interval | None:
        self.now += 2.0
        self.compared.append((dict(base), dict(variant)))
        if variant.get("level") == "refused":
            return None
        ratio = self._time(base) / self._time(variant)
        return Interval(value=ratio, low=ratio - self.uncertainty, high=ratio + self.uncertainty)

    def clock(self) -> float:
        return self.now

    def _time(self, settings: Mapping[str, Any]) -> float:
        return sum(self.milliseconds.get(name, {}).get(value, 1.0) for name, value in settings.items())


def test_keeps_of_each_setting_what_is_measurably_faster() -> None:
    machine = Machine({"threads": {1: 0.5}, "layout": {"columns": 1.2, "tiles": 0.4}})
    found = search(GIVEN, SETTINGS, machine.compare, 100, machine.clock)
    assert found.node == {"threads": 1, "layout": "tiles", "level": "all"}
    assert found.changes == ("threads=1", "layout=tiles")
    assert (found.num_tried, found.num_settings) == (5, 5)
    assert machine.compared[-1] == (GIVEN, found.node), "its gain is measured against the settings as given"
    assert found.gain is not None
    assert found.gain.value == pytest.approx(3.0 / 1.9)
    assert found.told() == (
        "searched 5 of 5 settings of the engine in 12 s: threads=1, layout=tiles give 1.58x [1.57, 1.59] the speed of "
        "those given"
    )


def test_what_may_be_noise_changes_nothing() -> None:
    machine = Machine({"threads": {1: 0.98}}, uncertainty=0.05)
    found = search(GIVEN, SETTINGS, machine.compare, 100, machine.clock)
    assert (found.node, found.changes, found.gain) == (GIVEN, (), None)
    assert found.told().endswith("none is measurably faster than those given")


def test_a_lead_that_is_not_there_again_is_none() -> None:
    machine = Machine({})
    luck = iter([1.1, 1.0, 1.0, 1.0, 1.0, 0.99])

    def compare(base: Mapping[str, Any], variant: Mapping[str, Any]) -> Interval:
        machine.compare(base, variant)
        ratio = next(luck)
        return Interval(value=ratio, low=ratio - 0.02, high=ratio + 0.02)

    assert search(GIVEN, SETTINGS, compare, 100, machine.clock).node == GIVEN


def test_begins_nothing_that_would_not_end_within_the_budget() -> None:
    machine = Machine({"threads": {1: 0.5}})
    found = search(GIVEN, SETTINGS, machine.compare, 9, machine.clock)
    assert machine.now <= 9
    assert found.num_tried == 3, "three comparisons of 2 s, and 2 s for the last one"
    assert "3 of 5 settings of the engine in 8 s (2 left for want of time, engine.search_seconds)" in found.told()


def test_goes_on_after_what_the_engine_refuses() -> None:
    machine = Machine({"threads": {1: 0.5}})
    found = search(GIVEN, {"level": ("refused",), **SETTINGS}, machine.compare, 100, machine.clock)
    assert found.changes == ("threads=1",)


def test_tries_what_the_engine_declares_within_the_target() -> None:
    assert variants(ORT, False, TARGET) == {
        "threads": (1,),
        "static_batch": (32,),
        "graph_optimization": ("extended", "basic"),
    }
    assert variants({**ORT, "threads": 1}, False, replace(TARGET, threads=4))["threads"] == (2, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("hydra")
def test_the_winner_is_what_is_compiled_and_written_down(tiny: tuple[str, ...]) -> None:
    """From a graph that is not optimised: what is faster takes seconds to find and is beyond any noise."""
    typed = ("engine=onnxruntime", "engine.graph_optimization=disabled", "engine.search_seconds=30")
    store = Store(Path(tiny[-1].partition("=")[2]))
    built = build(Composer.of([*tiny, *typed]).compose(), store, Tools())
    engine = read_json(built.compiled.folder / "engine.json")
    searched, *_ = read_notes(built.compiled.folder)
    assert searched.startswith("searched ")
    assert (engine["graph_optimization"] != "disabled") == ("graph_optimization=" in searched)
    assert engine["threads"] == 1
    again = build(Composer.of([*tiny, *typed]).compose(), store, Tools())
    assert not again.compiled.fresh
