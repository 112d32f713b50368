from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hasten.core.errors import ConfigError
from hasten.core.trial import Choice, Evaluation, Interval, OperatorGroup, Profile, Strategy, Trial
from hasten.planning.bottleneck import BottleneckPlanner, Edit, declared_gain

MakeTrial = Callable[..., Trial]


def profile(capacity: float = 0.0, operators: tuple[OperatorGroup, ...] = (), **shares: float) -> Profile:
    filled = {"compute": 0.0, "memory": 0.0, "overhead": 0.0, "capacity": capacity, **shares}
    return Profile(
        latency_ms=1.0,
        operators=operators,
        shares=filled,
        bottleneck="capacity" if capacity else max(filled, key=lambda name: filled[name]),
        evidence=(),
        weight_bytes=0,
    )


def operators(kind: str, share: float, bound: str) -> OperatorGroup:
    return OperatorGroup(
        kind=kind, calls=1, milliseconds=share, share=share, flops=0, num_bytes=0, bound=bound, roof_ms=share
    )


def strategy(name: str, addresses: Mapping[str, float], *attempts: Edit, **more: Any) -> Strategy:
    chosen: dict[str, Any] = {"search": None, "cost": 10.0, **more}
    return Strategy(name=name, description="", addresses=addresses, attempts=attempts or ((f"{name}=on",),), **chosen)


MIXED = profile(compute=0.5, memory=0.2, overhead=0.3)
ENGINE = strategy("engine", {"overhead": 4.0, "compute": 1.5}, ("engine=ort",), ("engine=ov",))
INT8 = strategy("int8", {"compute": 2.0}, ("quantization=static",), cost=20.0)
SEARCH = {"key": "pruning.sparsity", "low": 0.25, "high": 0.75, "tolerance": 0.15}
PRUNING = strategy("pruning", {"compute": 2.5}, ("pruning=structured",), search=SEARCH, cost=30.0)


@dataclass(kw_only=True)
class Loop:
    """A loop that is told each trial's outcome; recipes are sets of `group=value`, knobs of a group included."""

    trial: MakeTrial
    strategies: tuple[Strategy, ...]
    planner: BottleneckPlanner = field(default_factory=BottleneckPlanner)
    profile: Profile = MIXED
    refused: Mapping[Edit, str] = field(default_factory=dict)
    history: list[Trial] = field(default_factory=list)
    best: Trial = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.trial(0, profile=self.profile)
        self.history = [self.best]

    @property
    def lent(self) -> dict[str, Any]:
        return {"same_recipe": self.same_recipe, "inadmissible": lambda parent, edit: self.refused.get(edit)}

    def recipe(self, parent: int, edit: Edit) -> tuple[str, ...]:
        kept = dict(text.split("=") for text in self.history[parent].overrides)
        for text in edit:
            key, value = text.split("=")
            kept = {name: old for name, old in kept.items() if not name.startswith(f"{key}.")} | {key: value}
        return tuple(sorted(f"{key}={value}" for key, value in kept.items()))

    def same_recipe(self, parent: int, edit: Edit) -> Trial | None:
        recipe = self.recipe(parent, edit)
        return next((trial for trial in self.history if trial.overrides == recipe), None)

    def choose(self) -> Any:
        return self.planner.choose(self.history, self.best.profile, self.strategies, self.best, **self.lent)

    def why(self) -> str:
        return self.planner.why_stopped(self.history, self.best.profile, self.strategies, self.best, **self.lent)

    def go(self, verdict: str = "rejected", **values: Any) -> Any:
        """Chooses once and tries it with this outcome."""
        choice = self.choose()
        if choice is None:
            return None
        self.history.append(
            self.trial(
                len(self.history),
                parent=choice.parent,
                edit=choice.edit,
                strategy=choice.strategy,
                overrides=self.recipe(choice.parent, choice.edit),
                verdict=verdict,
                expected_gain=choice.expected_gain,
                **{"profile": self.profile if verdict == "accepted" else None, **values},
            )
        )
        if verdict == "accepted":
            self.best = self.history[-1]
        return choice


def test_amdahl_by_hand() -> None:
    # 0.5 / 1.5 + 0.2 + 0.3 / 4 = 0.60833
    assert declared_gain(ENGINE, MIXED) == pytest.approx(1 / 0.6083333)
    assert declared_gain(strategy("none", {}), MIXED) == pytest.approx(1.0)


def test_fewer_bytes_shorten_no_time() -> None:
    assert declared_gain(strategy("small", {"capacity": 10.0}), MIXED) == pytest.approx(1.0)


def test_only_the_operators_that_it_changes_get_faster(trial: MakeTrial) -> None:
    groups = (
        operators("convolution", 0.4, "compute"),
        operators("linear", 0.1, "compute"),
        operators("linear", 0.05, "memory"),
        operators("pooling", 0.15, "memory"),
    )
    found = profile(compute=0.5, memory=0.2, overhead=0.3, operators=groups)
    everything = {"compute": 2.0, "memory": 5.0, "overhead": 3.0}
    # A fifth of compute, a quarter of memory, 0.15 of the 0.7 in which operators run: 0.1 / 2 + 0.05 / 5 + 0.0643 / 3.
    linear = strategy("linear", everything, operators=("linear",))
    overhead = 0.3 * 0.15 / 0.7
    gained = 0.1 * (1 - 1 / 2) + 0.05 * (1 - 1 / 5) + overhead * (1 - 1 / 3)
    assert declared_gain(linear, found) == pytest.approx(1 / (1 - gained))
    assert declared_gain(strategy("all", everything), found) == pytest.approx(1 / (0.25 + 0.04 + 0.1))
    assert declared_gain(replace(linear, operators=("attention",)), found) == pytest.approx(1)
    choice = Loop(trial=trial, strategies=(linear,), profile=found).choose()
    assert choice.why.startswith("addresses compute 10% in linear operators; expected 1.15x")


def test_what_changes_operators_of_little_time_is_not_chosen(trial: MakeTrial) -> None:
    groups = (operators("convolution", 0.93, "memory"), operators("linear", 0.07, "memory"))
    narrow = strategy("narrow", {"memory": 2.0, "capacity": 3.5}, operators=("linear",))
    loop = Loop(trial=trial, strategies=(narrow,), profile=profile(memory=1.0, operators=groups))
    assert loop.choose() is None
    assert "narrow addresses what hardly matters (memory 7%, capacity 0% in linear operators)" in loop.why()
    # The bytes of a file are those of all weights.
    too_large = profile(memory=1.0, capacity=0.5, operators=groups)
    assert Loop(trial=trial, strategies=(narrow,), profile=too_large).choose().strategy == "narrow"


def test_prefers_the_most_gain_per_second(trial: MakeTrial) -> None:
    # engine: log(1.644) / 10 = 0.0497; int8: log(1 / 0.75) / 20 = 0.0144, but log(1 / 0.75) / 5 = 0.0575.
    choice = Loop(trial=trial, strategies=(INT8, ENGINE)).choose()
    assert (choice.strategy, choice.edit, choice.parent) == ("engine", ("engine=ort",), 0)
    assert choice.expected_gain == pytest.approx(1.6438, rel=1e-4)
    assert "overhead 30%" in choice.why
    assert Loop(trial=trial, strategies=(replace(INT8, cost=5.0), ENGINE)).choose().strategy == "int8"


def test_a_strategy_that_addresses_nothing_noticeable_is_not_chosen(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE,), profile=profile(memory=0.95, overhead=0.05))
    assert loop.choose() is None
    assert loop.why() == "no strategy is left: engine addresses what hardly matters (overhead 5%, compute 0%)"


def test_a_strategy_that_makes_things_slower_is_not_chosen(trial: MakeTrial) -> None:
    slower = strategy("slower", {"compute": 1.1, "memory": 0.2})
    assert Loop(trial=trial, strategies=(slower,)).choose() is None


def test_alternatives_are_worked_off_on_one_parent_before_anything_else(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE, INT8))
    first = loop.go("accepted", measured_gain=1.2, seconds=500.0)
    second = loop.go("rejected")
    third = loop.go("rejected")
    assert [(each.strategy, each.edit, each.parent) for each in (first, second, third)] == [
        ("engine", ("engine=ort",), 0),
        ("engine", ("engine=ov",), 0),
        ("int8", ("quantization=static",), 1),
    ]


def test_an_alternative_is_expected_to_do_what_it_would_have_done_to_the_parent(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE,))
    # As fast as expected, so that nothing is corrected; no overhead is left for the second engine.
    loop.go("accepted", measured_gain=declared_gain(ENGINE, MIXED), profile=profile(memory=1.0))
    assert loop.choose().expected_gain == pytest.approx(declared_gain(ENGINE, MIXED))


def test_an_attempt_is_made_once_on_a_recipe_and_again_on_a_better_one(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(INT8, replace(ENGINE, attempts=(("engine=ort",),), cost=60.0)))
    chosen = [loop.go("rejected"), loop.go("accepted", measured_gain=1.5), loop.go("rejected"), loop.go()]
    assert [each and (each.strategy, each.parent) for each in chosen] == [("int8", 0), ("engine", 0), ("int8", 2), None]
    assert "int8 has nothing new to try on trial 2" in loop.why()


def test_a_failed_attempt_is_not_made_again(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(INT8,))
    loop.go("failed")
    assert loop.choose() is None


def test_recipes_of_the_history_are_passed_over(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE,))
    loop.history.append(trial(1, overrides=("engine=ort",), strategy="given", verdict="rejected"))
    assert loop.choose().edit == ("engine=ov",)


def test_inadmissible_edits_are_passed_over_and_the_reason_is_told(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE,), refused={("engine=ort",): "not installed"})
    assert loop.go().edit == ("engine=ov",)
    assert loop.choose() is None
    assert "engine is refused: not installed" in loop.why()


def test_expectations_shrink_by_what_was_measured(trial: MakeTrial) -> None:
    # Half of the declared gain on the logarithmic scale was measured: the correction is 0.75.
    declared = declared_gain(ENGINE, MIXED)
    loop = Loop(trial=trial, strategies=(ENGINE,))
    loop.go("accepted", measured_gain=math.sqrt(declared))
    second = loop.go("rejected")
    assert second.expected_gain == pytest.approx(declared**0.75)
    assert f"corrected from {declared:.3g}x" in second.why


def test_a_disappointing_strategy_falls_behind(trial: MakeTrial) -> None:
    good = strategy("good", {"compute": 2.0}, ("x=1",), ("x=2",))
    other = strategy("other", {"compute": 1.9}, ("y=1",))
    loop = Loop(trial=trial, strategies=(good, other))
    assert [loop.go("rejected").strategy for _ in range(2)] == ["good", "good"]
    assert loop.go("accepted", measured_gain=1.3).strategy == "other"
    fresh = replace(other, attempts=(("z=1",),))
    loop.strategies = (good, fresh)
    assert loop.choose().strategy == "other"


def test_measured_cost_replaces_the_declared_one(trial: MakeTrial) -> None:
    cheap, dear = strategy("cheap", {"compute": 2.0}, cost=1.0), strategy("dear", {"compute": 2.0}, cost=5.0)
    loop = Loop(trial=trial, strategies=(cheap, dear))
    loop.go("rejected", seconds=400.0)
    loop.best = trial(2, overrides=("other=on",), profile=MIXED)
    loop.history.append(loop.best)
    assert loop.choose().strategy == "dear"


def test_searches_the_largest_value_that_holds(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(PRUNING,))
    chosen = [
        loop.go("accepted", measured_gain=1.2),
        loop.go("rejected", holds=False),
        loop.go("rejected", holds=True),
        loop.go("rejected", holds=False),
    ]
    assert [each.edit for each in chosen] == [
        ("pruning=structured", f"pruning.sparsity={value}") for value in (0.25, 0.75, 0.5, 0.62)
    ]
    assert {each.parent for each in chosen} == {0}
    assert loop.choose() is None  # on trial 1 every value up to there is a recipe of the history


def test_a_search_ends_where_its_first_value_breaks_a_constraint(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(PRUNING,))
    loop.go("rejected", holds=False)
    assert loop.choose() is None


def test_a_search_learns_from_recipes_that_are_known(trial: MakeTrial) -> None:
    known = {"overrides": ("pruning.sparsity=0.25", "pruning=structured"), "strategy": "given", "verdict": "rejected"}
    loop = Loop(trial=trial, strategies=(PRUNING,))
    loop.history.append(trial(1, holds=True, **known))
    assert loop.choose().edit[-1] == "pruning.sparsity=0.75"
    loop.history[-1] = trial(1, holds=False, **known)
    assert loop.choose() is None


def test_every_alternative_of_a_search_is_searched(trial: MakeTrial) -> None:
    both = replace(PRUNING, attempts=(("pruning=structured",), ("pruning=blocks",)))
    loop = Loop(trial=trial, strategies=(both,))
    edits = [loop.go("rejected", holds=False).edit for _ in range(2)]
    assert edits == [("pruning=structured", "pruning.sparsity=0.25"), ("pruning=blocks", "pruning.sparsity=0.25")]


def test_a_broken_size_limit_comes_before_all_gains(trial: MakeTrial) -> None:
    # A quarter of the bytes has to go: what is beyond a factor of 4 / 3 is worth nothing.
    small = strategy("small", {"capacity": 10.0}, cost=1000.0)
    smaller = strategy("smaller", {"capacity": 1.2}, cost=1000.0)
    too_large = profile(capacity=0.25, compute=0.7, overhead=0.3)
    assert Loop(trial=trial, strategies=(ENGINE, smaller, small), profile=too_large).choose().strategy == "small"
    assert Loop(trial=trial, strategies=(ENGINE, small)).choose().strategy == "engine"
    assert Loop(trial=trial, strategies=(small,)).choose() is None


def test_stops_when_the_trials_are_spent(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE, INT8), planner=BottleneckPlanner(max_trials=1))
    loop.go()
    assert loop.choose() is None
    assert loop.why() == "the budget of 1 trials is spent (planner.max_trials)"


def test_stops_when_the_recorded_minutes_are_spent(trial: MakeTrial) -> None:
    loop = Loop(trial=trial, strategies=(ENGINE, INT8), planner=BottleneckPlanner(max_minutes=1.5))
    loop.go(seconds=89.0)
    loop.go(seconds=0.5)
    assert loop.go(seconds=0.5) is not None
    assert loop.choose() is None
    assert loop.why() == "the budget of 1.5 minutes is spent, 1.5 are used (planner.max_minutes)"


def test_says_that_there_are_no_strategies(trial: MakeTrial) -> None:
    assert "strategy=[]" in Loop(trial=trial, strategies=()).why()


OUTCOMES = st.lists(
    st.tuples(st.sampled_from(["accepted", "rejected", "failed"]), st.floats(0.5, 4.0), st.booleans()), max_size=40
)


@given(outcomes=OUTCOMES, max_trials=st.integers(1, 20))
def test_ends_for_any_outcome_without_repeating_itself(
    outcomes: list[tuple[str, float, bool]], max_trials: int
) -> None:
    def make(number: int, **values: Any) -> Trial:
        filled: dict[str, Any] = {"parent": None, "overrides": (), "edit": (), "strategy": "baseline", **values}
        return Trial(number=number, bottleneck="", reason="", **{"verdict": "accepted", **filled})

    everything = (ENGINE, INT8, PRUNING)
    loop = Loop(trial=make, strategies=everything, planner=BottleneckPlanner(max_trials=max_trials))
    while loop.choose() is not None:
        verdict, gain, holds = outcomes.pop() if outcomes else ("rejected", 1.0, False)
        again = loop.choose()
        assert loop.go(verdict, measured_gain=gain, holds=holds or verdict == "accepted") == again
        assert isinstance(again, Choice)
        assert again.expected_gain > 1
    recipes = [each.overrides for each in loop.history]
    assert len(set(recipes)) == len(recipes) <= max_trials + 1
    assert loop.why()


def test_estimates_one_round_within_the_trials(trial: MakeTrial) -> None:
    # Two engines at 10 s, one int8 at 20 s, and at most four values of the sparsity at 30 s.
    strategies = (ENGINE, INT8, PRUNING)
    assert BottleneckPlanner().estimate([trial(0)], strategies) == [
        ("engine", 2, 20.0),
        ("int8", 1, 20.0),
        ("pruning", 4, 120.0),
    ]
    assert BottleneckPlanner(max_trials=5).estimate([trial(0)], strategies) == [
        ("engine", 0, 0.0),
        ("int8", 1, 20.0),
        ("pruning", 4, 120.0),
    ]


def test_estimates_with_what_trials_really_cost(trial: MakeTrial) -> None:
    history = [trial(0), trial(1, strategy="int8", seconds=7.0)]
    assert BottleneckPlanner().estimate(history, (INT8,)) == [("int8", 1, 7.0)]


def test_an_earlier_run_corrects_the_first_expectation(tmp_path: Path, trial: MakeTrial) -> None:
    earlier = {"strategy": "engine", "verdict": "rejected", "expected_gain": 2.0, "measured_gain": 1.9}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"trials": [earlier]}))
    loop = Loop(trial=trial, strategies=(ENGINE,), planner=BottleneckPlanner(prior=str(file)))
    assert loop.choose().expected_gain == pytest.approx(math.sqrt(declared_gain(ENGINE, MIXED)))


def test_a_prior_that_can_not_be_read_is_told_when_the_planner_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"planner\.prior="):
        BottleneckPlanner(prior=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (strategy("s", {"computation": 2.0}), r"strategies\.s\.addresses: 'computation' is no bottleneck"),
        (strategy("s", {"compute": 0.0}), r"strategies\.s\.addresses\.compute must be a factor above 0, got 0"),
        (
            strategy("s", {"compute": 2.0}, operators=("liner",)),
            r"operators: 'liner' is no kind of operator; there are ",
        ),
        (strategy("s", {"compute": 2.0}, search={"key": "k", "low": 1}), r"strategies\.s\.search must spell"),
        (strategy("s", {"compute": 2.0}, search={**SEARCH, "key": None}), r"strategies\.s\.search\.key"),
    ],
)
def test_refuses_a_strategy_that_makes_no_sense_before_anything_runs(
    trial: MakeTrial, wrong: Strategy, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        BottleneckPlanner().estimate([], [wrong])
    with pytest.raises(ConfigError, match=problem):
        Loop(trial=trial, strategies=(wrong,)).choose()


@pytest.mark.parametrize(("knob", "value"), [("max_trials", 0), ("max_minutes", 0.0), ("prior", 3)])
def test_declares_the_range_of_its_knobs(knob: str, value: Any) -> None:
    hints = get_type_hints(BottleneckPlanner, include_extras=True)
    with pytest.raises(ValidationError):
        TypeAdapter(hints[knob]).validate_python(value)


SMALL = strategy("small", {"compute": 1.5, "capacity": 4.0}, cost=20.0)


def served(latency_ms: float) -> Evaluation:
    around = Interval(value=latency_ms, low=latency_ms, high=latency_ms)
    rows = 1000 / latency_ms
    return Evaluation(
        metric="accuracy",
        quality=0.98,
        drop=None,
        latency_ms={"p50": around},
        throughput=Interval(value=rows, low=rows, high=rows),
        speedup={},
        references_ms={},
        size_bytes=1,
        memory_bytes=1,
        flops=1,
        num_parameters=1,
    )


def sized(trial: MakeTrial, latency_ms: float = 1.0, **knobs: Any) -> Loop:
    loop = Loop(trial=trial, strategies=(ENGINE, SMALL), planner=BottleneckPlanner(**{"optimize": "size", **knobs}))
    loop.best = loop.history[0] = replace(loop.best, evaluation=served(latency_ms))
    return loop


def test_where_size_is_optimised_only_what_shrinks_the_files_is_tried(trial: MakeTrial) -> None:
    loop = sized(trial)
    choice = loop.go()
    assert (choice.strategy, choice.expected_gain) == ("small", pytest.approx(4.0))
    assert choice.why.startswith("addresses size (objective.optimize)")
    assert loop.go() is None
    assert "engine does not shrink the files (objective.optimize=size)" in loop.why()


@pytest.mark.parametrize("limit", [{"max_latency_ms": 0.5}, {"min_throughput": 2000.0}])
def test_time_counts_beside_size_while_a_limit_of_speed_is_broken(trial: MakeTrial, limit: dict[str, float]) -> None:
    # small: (log(4) + log(1 / (0.5 / 1.5 + 0.5))) / 20 = 0.0784; engine: log(1.644) / 10 = 0.0497.
    loop = sized(trial, **limit)
    assert [loop.go().strategy, loop.go().strategy] == ["small", "engine"]
    assert sized(trial, latency_ms=0.4, **limit).go().strategy == "small"
    quick = sized(trial, latency_ms=0.4, **limit)
    quick.go()
    assert quick.go() is None


def test_memory_is_also_a_matter_of_the_engine(trial: MakeTrial) -> None:
    loop = sized(trial, optimize="memory")
    assert {loop.go().strategy, loop.go().strategy, loop.go().strategy} == {"small", "engine"}


def test_bytes_that_were_saved_teach_about_bytes(trial: MakeTrial) -> None:
    loop = sized(trial)
    again = strategy("small", {"capacity": 4.0}, ("small=1",), ("small=2",))
    loop.strategies = (again,)
    loop.go("accepted", measured_gain=2.0, evaluation=served(1.0))
    # One trial gave log(2) / log(4) = 0.5 of what was declared: (1 + 0.5) / 2 = 0.75, and 4 ** 0.75 = 2.83.
    assert loop.go().expected_gain == pytest.approx(4**0.75)
