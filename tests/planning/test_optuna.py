"""What the planner does with a space and a history; outcomes are calculated by hand-made worlds, nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit
from hasten.core.trial import Drop, Evaluation, Interval, Profile, Quality, Trial

pytest.importorskip("optuna")

from hasten.planning.optuna import OptunaPlanner

SPACE: Mapping[str, Any] = {
    "network": [["student=same"], ["student=small"]],
    "pruning": {"key": "pruning", "values": ["none", "structured"]},
    "sparsity": {"key": "pruning.sparsity", "low": 0.1, "high": 0.9, "step": 0.1},
    "engine": {"key": "engine", "values": ["eager", "fast", "faster"]},
}
NUM_POINTS = 2 * (1 + 9) * 3
PROFILE = Profile(latency_ms=1.0, operators=(), shares={}, bottleneck="compute", evidence=(), weight_bytes=0)
ALLOWED = 0.02


def speed_of(recipe: Mapping[str, str]) -> float:
    """The smaller network and the faster engine multiply; a pruned share of the channels leaves its complement."""
    small = 2.0 if recipe["student"] == "small" else 1.0
    engine = {"eager": 1.0, "fast": 2.0, "faster": 4.0}[recipe["engine"]]
    return small * engine / (1 - float(recipe.get("pruning.sparsity", 0.0)))


def drop_of(recipe: Mapping[str, str]) -> float:
    """A twentieth of what is pruned: 40 % and less hold."""
    return float(recipe.get("pruning.sparsity", 0.0)) / 20


BEST = 2.0 * 4.0 / 0.6


def measured(speed: float, drop: float, allowed: float = ALLOWED) -> Evaluation:
    exact = Interval(value=speed, low=speed, high=speed)
    lost = Drop(value=drop, bound=drop, confidence=0.95, rows=100)
    return Evaluation(
        metric="accuracy",
        quality=0.98 - drop,
        drop=lost,
        latency_ms={"p50": Interval(value=1 / speed, low=1 / speed, high=1 / speed)},
        throughput=exact,
        speedup={"eager": exact, "previous": exact},
        references_ms={},
        size_bytes=int(1e6 / speed),
        memory_bytes=10**6,
        flops=1,
        num_parameters=1,
        metrics={"accuracy": Quality(value=0.98 - drop, drop=lost, max_drop=allowed, higher_is_better=True)},
    )


@dataclass(kw_only=True)
class World:
    """A loop whose trials turn out as calculated; `refused` recipes make no sense, of `broken` ones nothing comes."""

    trial: Callable[..., Trial]
    planner: OptunaPlanner
    refused: Callable[[Mapping[str, str]], bool] = lambda recipe: False
    broken: Callable[[Mapping[str, str]], bool] = lambda recipe: False
    allowed: float = ALLOWED
    history: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = [self.trial(0, evaluation=measured(1.0, 0.0), profile=PROFILE)]

    @property
    def lent(self) -> dict[str, Any]:
        def same_recipe(parent: int, edit: Edit) -> Trial | None:
            assert parent == 0
            return next((trial for trial in self.history if trial.overrides == edit), None)

        def inadmissible(parent: int, edit: Edit) -> str | None:
            return "refused" if self.refused(read(edit)) else None

        return {"same_recipe": same_recipe, "inadmissible": inadmissible}

    def choose(self) -> Any:
        return self.planner.choose(self.history, PROFILE, [], self.history[0], **self.lent)

    def why(self) -> str:
        return self.planner.why_stopped(self.history, PROFILE, [], self.history[0], **self.lent)

    def go(self) -> Any:
        choice = self.choose()
        if choice is None:
            return None
        recipe = read(choice.edit)
        made = None if self.broken(recipe) else measured(speed_of(recipe), drop_of(recipe), self.allowed)
        holds = made is not None and drop_of(recipe) <= self.allowed
        self.history.append(
            self.trial(
                len(self.history),
                parent=choice.parent,
                edit=choice.edit,
                overrides=choice.edit,
                strategy=choice.strategy,
                verdict="failed" if made is None else "rejected",
                holds=holds,
                evaluation=made,
                seconds=30.0,
            )
        )
        return choice

    def play(self) -> World:
        while self.go():
            pass
        return self

    @property
    def edits(self) -> list[Edit]:
        return [trial.edit for trial in self.history[1:]]

    @property
    def best(self) -> float:
        return max(trial.speedup["eager"].value for trial in self.history if trial.holds)


def read(edit: Edit) -> dict[str, str]:
    return dict(text.split("=") for text in edit)


def planner(**knobs: Any) -> OptunaPlanner:
    return OptunaPlanner(**{"space": SPACE, "max_trials": 20, **knobs})


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "grid"])
def test_every_choice_is_new_and_edits_the_untouched_model(trial: Any, sampler: str) -> None:
    world = World(trial=trial, planner=planner(sampler=sampler)).play()
    assert len(set(world.edits)) == len(world.edits) == 20
    assert {made.parent for made in world.history[1:]} == {0}
    assert world.why() == "the budget of 20 trials is spent (planner.max_trials)"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "grid"])
def test_choices_are_a_function_of_the_history(trial: Any, sampler: str) -> None:
    once = World(trial=trial, planner=planner(sampler=sampler, max_trials=9)).play()
    again = World(trial=trial, planner=planner(sampler=sampler, max_trials=9))
    again.history = once.history[:6]
    again.history = list(again.history)
    assert again.play().edits == once.edits


def test_other_seeds_begin_elsewhere(trial: Any) -> None:
    worlds = [World(trial=trial, planner=planner(seed=seed, max_trials=5)).play() for seed in (0, 1)]
    assert worlds[0].edits != worlds[1].edits


def test_learns_what_is_fast_and_holds(trial: Any) -> None:
    """Three of 60 points are within a quarter of the best that holds, 8 / (1 - 0.4)."""
    found = [World(trial=trial, planner=planner(seed=seed)).play().best for seed in range(4)]
    drawn = [World(trial=trial, planner=planner(seed=seed, sampler="random")).play().best for seed in range(4)]
    assert sum(found) > sum(drawn)
    assert sum(best >= 0.75 * BEST for best in found) >= 3


def test_a_constraint_keeps_it_from_what_is_fast_and_wrong(trial: Any) -> None:
    everywhere = {**SPACE, "sparsity": {**SPACE["sparsity"], "step": None}}
    worlds = [
        World(trial=trial, planner=planner(space=everywhere), allowed=allowed).play() for allowed in (ALLOWED, 1.0)
    ]
    pruned_too_much = [sum(drop_of(read(edit)) > ALLOWED for edit in world.edits[8:]) for world in worlds]
    assert pruned_too_much[0] < pruned_too_much[1]
    assert worlds[0].best >= 0.75 * BEST


def test_what_makes_no_sense_is_never_tried_and_costs_no_trial(trial: Any) -> None:
    world = World(
        trial=trial,
        planner=planner(sampler="random", max_trials=NUM_POINTS),
        refused=lambda recipe: recipe["engine"] != "fast" or recipe["pruning"] != "none",
    ).play()
    assert sorted(world.edits) == [
        ("student=same", "pruning=none", "engine=fast"),
        ("student=small", "pruning=none", "engine=fast"),
    ]
    assert "proposals in a row were tried before or refused" in world.why()


def test_goes_on_after_trials_that_failed(trial: Any) -> None:
    world = World(trial=trial, planner=planner(), broken=lambda recipe: recipe["engine"] == "faster").play()
    assert len(world.edits) == 20
    assert world.best > 1


def test_a_grid_tries_every_point_in_its_order(trial: Any) -> None:
    world = World(trial=trial, planner=planner(sampler="grid", max_trials=100)).play()
    assert len(world.edits) == NUM_POINTS
    assert world.edits[:4] == [
        ("student=same", "pruning=none", "engine=eager"),
        ("student=same", "pruning=none", "engine=fast"),
        ("student=same", "pruning=none", "engine=faster"),
        ("student=same", "pruning=structured", "pruning.sparsity=0.1", "engine=eager"),
    ]
    assert world.why() == "every point of the space has been tried or refused (planner.space)"


def test_stops_when_its_minutes_are_spent(trial: Any) -> None:
    world = World(trial=trial, planner=planner(max_minutes=2)).play()
    assert len(world.edits) == 4
    assert world.why() == "the budget of 2 minutes is spent, 2 are used (planner.max_minutes)"


def test_smaller_is_better_where_size_is_optimised(trial: Any) -> None:
    world = World(trial=trial, planner=planner(optimize="size", max_trials=24)).play()
    assert world.best >= 0.75 * BEST  # sizes are made up as the inverse of speeds


def test_an_estimate_before_and_after_the_first_trials(trial: Any) -> None:
    world = World(trial=trial, planner=planner(max_trials=10, cost=7))
    assert world.planner.estimate(world.history, []) == [("search", 10, 70.0)]
    world.go()
    assert world.planner.estimate(world.history, []) == [("search", 9, 270.0)]


def test_a_missing_optuna_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.planning.sampling.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"planner=optuna needs Optuna.*: pip install 'hasten\[sweeps\]'"):
        planner()


def test_a_wrong_space_is_told_when_the_planner_is_made() -> None:
    with pytest.raises(ConfigError, match=r"space\.a must be a list of alternatives"):
        planner(space={"a": 1})


def test_optuna_is_not_imported_before_it_is_asked() -> None:
    import subprocess

    code = "import sys, hasten.planning.optuna; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.slow
def test_goes_round_the_loop(tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    import json
    from pathlib import Path

    from hasten import cli

    mine = ["planner=optuna", "planner.max_trials=2", "space.network=null", "space.widths=null", "space.pruning=null"]
    left = ["space.sparsity=null", "space.distillation=null", "hydra.run.dir=left"]
    assert cli.run(["optimize", *tiny, *mine, *left]) == 0
    summary = json.loads(Path("left/summary.json").read_text())
    assert [made["strategy"] for made in summary["trials"]] == ["baseline", "search", "search"]
    assert {made["parent"] for made in summary["trials"][1:]} == {0}
