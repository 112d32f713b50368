"""Successive halving, played through in worlds where the speed and the loss of every recipe are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit
from hasten.core.search import Halving, covering
from hasten.core.trial import Drop, Evaluation, Interval, Profile, Strategy, Trial
from hasten.planning.bottleneck import BottleneckPlanner, check
from hasten.planning.halving import drawn, kept, max_trials

CHEAP, FULL = "pruning.epochs=0", "pruning.epochs=9"
SEARCH = {
    "halving": {
        "space": {"numbers": [["bits=32"], ["bits=8"]]},
        "rungs": [[CHEAP], [FULL]],
        "keep": 0.34,
    }
}
ATTEMPTS: tuple[Edit, ...] = (("pruning=none",), ("pruning=low",), ("pruning=high",))
ALLOWED = 0.02
SHARES = {"compute": 1.0, "memory": 0.0, "overhead": 0.0, "capacity": 0.0}
PROFILE = Profile(latency_ms=1.0, operators=(), shares=SHARES, bottleneck="compute", evidence=(), weight_bytes=0)


def joint(**more: Any) -> Strategy:
    values: dict[str, Any] = {"attempts": ATTEMPTS, "search": SEARCH, "cost": 5.0, **more}
    return Strategy(name="joint", description="", addresses={"compute": 4.0}, **values)


def measured(speed: float, before: float, drop: float, size_bytes: int = 100) -> Evaluation:
    """`speed` is against eager PyTorch; its interval against the best before is 1 % wide."""
    one = Interval(value=1.0, low=1.0, high=1.0)
    ratio = speed / before
    return Evaluation(
        metric="accuracy",
        quality=0.98 - drop,
        drop=Drop(value=drop, bound=drop, confidence=0.95, rows=100),
        latency_ms={"p50": one},
        throughput=one,
        speedup={
            "eager": Interval(value=speed, low=speed, high=speed),
            "previous": Interval(value=ratio, low=0.99 * ratio, high=1.01 * ratio),
        },
        references_ms={},
        size_bytes=size_bytes,
        memory_bytes=1,
        flops=1,
        num_parameters=1,
    )


@dataclass(kw_only=True)
class World:
    """A loop whose trials turn out as `speed` and `drop` say; recipes are sets of `group=value`.

    Attributes:
        speed: of a recipe against eager PyTorch; None where it fails.
        drop: of quality.
    """

    speed: Callable[[Mapping[str, str]], float | None]
    drop: Callable[[Mapping[str, str]], float]
    strategy: Strategy = field(default_factory=joint)
    planner: BottleneckPlanner = field(default_factory=BottleneckPlanner)
    refused: Callable[[Mapping[str, str]], bool] = lambda recipe: False
    history: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._keep(0, None, (), 1.0, 0.0, "accepted")

    @property
    def best(self) -> Trial:
        return [trial for trial in self.history if trial.verdict == "accepted"][-1]

    @property
    def tried(self) -> list[str]:
        return [" ".join(trial.edit) for trial in self.history[1:]]

    def recipe(self, parent: int, edit: Edit) -> dict[str, str]:
        kept = dict(text.split("=") for text in self.history[parent].overrides)
        for text in edit:
            key, value = text.split("=")
            kept = {name: old for name, old in kept.items() if not name.startswith(f"{key}.")} | {key: value}
        if kept.get("pruning") == "none":
            del kept["pruning"]
        return {key: value for key, value in sorted(kept.items()) if (key, value) != ("bits", "32")}

    def lent(self) -> dict[str, Any]:
        def same_recipe(parent: int, edit: Edit) -> Trial | None:
            overrides = tuple(f"{key}={value}" for key, value in self.recipe(parent, edit).items())
            return next((trial for trial in self.history if trial.overrides == overrides), None)

        def inadmissible(parent: int, edit: Edit) -> str | None:
            return "refused" if self.refused(self.recipe(parent, edit)) else None

        return {"same_recipe": same_recipe, "inadmissible": inadmissible}

    def choose(self) -> Any:
        return self.planner.choose(self.history, PROFILE, [self.strategy], self.best, **self.lent())

    def go(self) -> Trial | None:
        choice = self.choose()
        if choice is None:
            return None
        recipe = self.recipe(choice.parent, choice.edit)
        speed, drop = self.speed(recipe), self.drop(recipe)
        before = self.best.evaluation
        assert before is not None
        verdict = "failed"
        if speed is not None:
            better = 0.99 * speed / before.speedup["eager"].value > 1
            verdict = "accepted" if better and drop <= ALLOWED else "rejected"
        return self._keep(choice.parent, choice, choice.edit, speed, drop, verdict)

    def play(self) -> World:
        while self.go():
            pass
        return self

    def _keep(
        self, parent: int | None, choice: Any, edit: Edit, speed: float | None, drop: float, verdict: Any
    ) -> Trial:
        first = choice is None
        before = 1.0 if first else self.best.evaluation.speedup["eager"].value  # type: ignore[union-attr]
        trial = Trial(
            number=len(self.history),
            parent=None if first else parent,
            overrides=() if first else tuple(f"{k}={v}" for k, v in self.recipe(choice.parent, edit).items()),
            edit=edit,
            strategy="baseline" if first else choice.strategy,
            bottleneck="compute",
            verdict=verdict,
            reason="",
            expected_gain=None if first else choice.expected_gain,
            measured_gain=None if speed is None or first else speed / before,
            holds=speed is not None and drop <= ALLOWED,
            evaluation=None if speed is None else measured(speed, before, drop),
            profile=PROFILE if verdict == "accepted" else None,
            seconds=1.0,
        )
        self.history.append(trial)
        return trial


PRUNED = {"low": 1.5, "high": 2.5}


def by_choice(recipe: Mapping[str, str]) -> float:
    return PRUNED.get(recipe.get("pruning", ""), 1.0) * (2.0 if recipe.get("bits") == "8" else 1.0)


def untrained(recipe: Mapping[str, str]) -> float:
    """Channels that are gone cost 5 or 10 points until the rest has been trained, 8 bits cost 3."""
    lost = {"low": 0.05, "high": 0.10}.get(recipe.get("pruning", ""), 0.0)
    lost = lost * (0.1 if recipe.get("pruning.epochs") == "9" else 1.0)
    return lost + (0.03 if recipe.get("bits") == "8" else 0.0)


def test_cheap_trials_first_then_the_best_share_in_earnest() -> None:
    world = World(speed=by_choice, drop=untrained).play()
    assert world.tried == [
        # The untouched recipe is known; of the five others a third of all six goes on.
        "pruning=none bits=8",
        f"pruning=low bits=32 {CHEAP}",
        f"pruning=low bits=8 {CHEAP}",
        f"pruning=high bits=32 {CHEAP}",
        f"pruning=high bits=8 {CHEAP}",
        # 8 bits alone lose least, but training does not change them: 5 and 8 points are the least that it may win back.
        f"pruning=low bits=32 {FULL}",
        f"pruning=low bits=8 {FULL}",
    ]
    assert world.best.edit == ("pruning=low", "bits=32", FULL)


def test_what_is_not_measurably_faster_is_not_trained_however_good_it_is() -> None:
    def speed(recipe: Mapping[str, str]) -> float:
        return 1.005 if recipe.get("pruning") == "low" else by_choice(recipe)

    world = World(speed=speed, drop=untrained).play()
    assert [text for text in world.tried if FULL in text] == [
        f"pruning=high bits=32 {FULL}",
        f"pruning=high bits=8 {FULL}",
    ]


def test_what_already_holds_and_is_accepted_is_neither_trained_nor_beaten_by_something_slower() -> None:
    world = World(speed=by_choice, drop=lambda recipe: 0.0).play()
    assert world.best.edit == ("pruning=high", "bits=8", CHEAP)
    assert not [text for text in world.tried if FULL in text]


def test_a_candidate_that_can_not_win_any_more_is_not_trained() -> None:
    """Training gives back all that `high bits=8` lost, which is faster than the other that was to be trained."""

    def drop(recipe: Mapping[str, str]) -> float:
        full, high = recipe.get("pruning.epochs") == "9", recipe.get("pruning") == "high"
        return (
            0.0
            if full
            else {("high", "8"): 0.03, ("high", None): 0.04}.get(("high" if high else "", recipe.get("bits")), 0.3)
        )

    world = World(speed=by_choice, drop=drop).play()
    assert [text for text in world.tried if FULL in text] == [f"pruning=high bits=8 {FULL}"]
    assert world.best.edit == ("pruning=high", "bits=8", FULL)


def test_where_size_is_optimised_bytes_decide_who_goes_on() -> None:
    world = World(speed=lambda recipe: 1.0, drop=untrained, planner=BottleneckPlanner(optimize="size"))
    world.strategy = Strategy(
        name="joint", description="", addresses={"capacity": 4.0}, attempts=ATTEMPTS, search=SEARCH, cost=5.0
    )
    world.play()
    assert world.tried
    assert not [text for text in world.tried if FULL in text], "all are as large as the baseline"


def test_what_is_refused_and_what_fails_goes_on_no_further() -> None:
    world = World(
        speed=lambda recipe: None if recipe.get("pruning") == "low" else by_choice(recipe),
        drop=untrained,
        refused=lambda recipe: recipe.get("bits") == "8",
    ).play()
    assert world.tried == [
        f"pruning=low bits=32 {CHEAP}",
        f"pruning=high bits=32 {CHEAP}",
        f"pruning=high bits=32 {FULL}",
    ]


def test_a_space_too_large_for_the_trials_is_thinned_out_so_that_the_last_rung_is_reached() -> None:
    world = World(speed=by_choice, drop=untrained, planner=BottleneckPlanner(max_trials=4)).play()
    assert sum(FULL in text for text in world.tried) == 1
    assert len(world.tried) <= 4


@given(
    speeds=st.lists(st.one_of(st.none(), st.floats(0.5, 5.0)), min_size=6, max_size=6),
    drops=st.lists(st.floats(-0.01, 0.1), min_size=18, max_size=18),
    refused=st.sets(st.integers(0, 5), max_size=3),
    max_trials=st.integers(1, 20),
    keep=st.floats(0.05, 0.95),
    num_rungs=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_ends_repeats_nothing_and_trains_only_what_survived(
    speeds: list[float | None],
    drops: list[float],
    refused: set[int],
    max_trials: int,
    keep: float,
    num_rungs: int,
) -> None:
    rungs = [[f"pruning.epochs={rung}"] for rung in range(num_rungs)]

    def place(recipe: Mapping[str, str]) -> int:
        return ["none", "low", "high"].index(recipe.get("pruning", "none")) * 2 + (recipe.get("bits") == "8")

    def rung_of(recipe: Mapping[str, str]) -> int:
        return int(recipe.get("pruning.epochs", 0))

    search = {"halving": {**SEARCH["halving"], "rungs": rungs, "keep": keep}}
    world = World(
        speed=lambda recipe: speeds[place(recipe)],
        drop=lambda recipe: drops[place(recipe) * 3 + rung_of(recipe)],
        strategy=joint(search=search),
        planner=BottleneckPlanner(max_trials=max_trials),
        refused=lambda recipe: place(recipe) in refused,
    )
    while True:
        again = world.choose()
        trial = world.go()
        assert (trial is None) == (again is None)
        if trial is None:
            break
        assert trial.edit == again.edit, "the same history gives the same choice"
        recipe = world.recipe(trial.parent or 0, trial.edit)
        assert place(recipe) not in refused
        if rung_of(recipe) > 0:  # it was surely faster than the best before when it was tried at the rung below
            cheaper = {**recipe, "pruning.epochs": str(rung_of(recipe) - 1)}
            overrides = tuple(f"{key}={value}" for key, value in sorted(cheaper.items()))
            below = next(each for each in world.history if each.overrides == overrides)
            assert below.evaluation is not None
            assert below.evaluation.speedup["previous"].low > 1
    assert len({trial.overrides for trial in world.history}) == len(world.history) <= max_trials + 1


def test_counts_the_trials_of_all_rungs() -> None:
    # 9 candidates, a third of them, a third of those.
    halving = Halving(space=(), rungs=((), (), ()), keep=1 / 3)
    assert max_trials(halving, 9) == 9 + 3 + 1
    assert [kept(number, 1 / 3) for number in (9, 8, 2)] == [3, 2, 1]


def test_fewer_candidates_are_drawn_out_of_more_and_always_the_same() -> None:
    halving = Halving(space=(), rungs=((), ()), keep=0.5)
    edits = [(f"a={number}",) for number in range(8)]
    draws = [drawn(halving, edits, trials) for trials in (3, 6, 9, 12, 99)]
    assert [len(draw) for draw in draws] == [2, 4, 6, 8, 8]
    assert all(set(less) <= set(more) for less, more in pairwise(draws))
    assert draws[-1] == edits
    assert drawn(halving, edits, 6) == draws[1]


def test_a_rung_goes_to_those_that_choose_its_group() -> None:
    halving = Halving.of({"space": {"a": [["bits=8"]]}, "rungs": [[CHEAP, "bits.rows=3"], []], "keep": 0.5})
    assert halving.at(("pruning=low", "bits=8"), 0) == ("pruning=low", "bits=8", CHEAP, "bits.rows=3")
    assert halving.at(("pruning=none",), 0) == ("pruning=none",)
    assert halving.at(("pruning=low",), 1) == ("pruning=low",)


def test_a_few_edits_hold_every_override() -> None:
    edits = covering(joint())
    assert {text for edit in edits for text in edit} == {
        "pruning=none",
        "pruning=low",
        "pruning=high",
        "bits=32",
        "bits=8",
        CHEAP,
        FULL,
    }
    assert len(edits) < 12


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"keep": 1.0}, r"strategies\.joint\.search\.halving\.keep must be a number in \(0, 1\), got 1"),
        ({"keep": None}, r"strategies\.joint\.search\.halving must spell space"),
        ({"rungs": []}, r"strategies\.joint\.search\.halving needs at least one rung"),
        ({"space": {"numbers": []}}, r"strategies\.joint\.search\.halving needs .*alternative"),
        ({"rungs": ["pruning.epochs=0"]}, r"is no list of overrides"),
        ({"rungs": [["trainer.epochs=3"]]}, r"trainer\.epochs=3 is for no candidate, as none chooses trainer"),
    ],
)
def test_refuses_a_halving_that_makes_no_sense(changed: dict[str, Any], told: str) -> None:
    wrong = joint(search={"halving": {**SEARCH["halving"], **changed}})
    with pytest.raises(ConfigError, match=told):
        check([wrong])


def test_estimates_all_rungs() -> None:
    # Six candidates, of which floor(0.34 * 6) = 2 are trained.
    assert BottleneckPlanner().estimate([], [joint()]) == [("joint", 8, 40.0)]
