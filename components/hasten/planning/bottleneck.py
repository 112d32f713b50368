"""Chooses the strategy with the highest expected gain per second for the measured bottleneck.

Every choice is a function of the history alone, so that a run that is started again, or replayed from stored
measurements, takes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from hasten.artefacts.operators import KINDS
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit, Inadmissible, Planner, SameRecipe
from hasten.core.search import Halving, covering, halving
from hasten.core.training_objective import TRAINING
from hasten.core.trial import BOTTLENECKS, Choice, Diagnosis, Estimate, Strategy, Trial
from hasten.planning.bisection import max_values, next_value
from hasten.planning.halving import Race, drawn, max_trials
from hasten.planning.prior import Lesson, correction, lessons, read_prior

NOTICEABLE = 0.1
"""Share of the latency from which on a bottleneck is worth addressing: without it a request is 1.1 times as fast."""

Known = Callable[[int, Edit], bool | None]


@dataclass(frozen=True, kw_only=True)
class BottleneckPlanner(Planner):
    """Ranks strategies by log(expected gain) / expected seconds.

    The gain that a strategy declares is Amdahl's, 1 / sum(share_c / factor_c) over compute, memory and overhead; of a
    strategy for some kinds of operators, over their part of each share. Its logarithm is multiplied by what the
    strategy's earlier trials suggest (`planning.prior.correction`). Fewer bytes shorten no time: they count where a
    size limit is broken, and then before all else.

    Where size or memory is optimised, the declared gain is the factor by which a strategy shrinks the files (its
    `capacity`). Time then counts beside it only where the best trial breaks a limit of latency or throughput, and for
    memory, which the engine that serves the requests decides as much as the weights do.

    Once chosen, a strategy is worked off, every attempt with all that its search asks for, on the recipe that was the
    best when it was chosen. No attempt is made twice on one recipe, and none that gives a recipe of the history.

    Attributes:
        max_trials: trials without the baseline.
        max_minutes: budget of recorded cost of the trials, without the baseline, which has to be there anyhow; None for
            none.
        prior: summary.json of an earlier run to learn from; None to start afresh.
        optimize: the objective's.
        max_latency_ms: the objective's.
        min_throughput: the objective's.

    Raises:
        ConfigError: `prior` can't be read.
    """

    max_trials: Annotated[int, Ge(1)] = 14
    max_minutes: Annotated[float, Gt(0)] | None = None
    prior: str | None = None
    optimize: Literal["p50", "p90", "p99", "throughput", "size", "memory", "training"] = "p50"
    max_latency_ms: Annotated[float, Gt(0)] | None = None
    min_throughput: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        _ = self._taught  # A file that can't be read is told before anything has been trained.

    @cached_property
    def _taught(self) -> tuple[Lesson, ...]:
        return () if self.prior is None else read_prior(self.prior, self.optimize)

    def choose(
        self,
        history: Sequence[Trial],
        profile: Diagnosis,
        strategies: Sequence[Strategy],
        best: Trial,
        *,
        same_recipe: SameRecipe,
        inadmissible: Inadmissible,
    ) -> Choice | None:
        """The next open edit of the strategy that was begun, else of the one with the most gain per second.

        Raises:
            ConfigError: a strategy addresses what is no bottleneck, or its search makes no sense.
        """
        check(strategies)
        if self._spent(history):
            return None
        lent = _Lent(same_recipe=same_recipe, inadmissible=inadmissible)
        if begun := _begun(history, strategies):
            strategy, parent = begun
            if edit := self._open_edit(strategy, parent.number, history, lent):
                return self._step(strategy, edit, parent, parent.diagnosis or profile, history)
        ranked = sorted(
            (strategy for strategy in strategies if self._relieves(strategy, profile, best)),
            key=lambda strategy: self._rank(strategy, profile, history, best),
        )
        for strategy in ranked:
            if edit := self._open_edit(strategy, best.number, history, lent):
                return self._step(strategy, edit, best, profile, history)
        return None

    def why_stopped(
        self,
        history: Sequence[Trial],
        profile: Diagnosis,
        strategies: Sequence[Strategy],
        best: Trial,
        *,
        same_recipe: SameRecipe,
        inadmissible: Inadmissible,
    ) -> str:
        """Why `choose` gave None, one clause for each strategy where no budget was the reason."""
        if spent := self._spent(history):
            return spent
        if not strategies:
            return "there are no strategies (strategy=[])"
        obstacles = (self._obstacle(each, profile, best, inadmissible) for each in strategies)
        return f"no strategy is left: {'; '.join(obstacles)}"

    def estimate(self, history: Sequence[Trial], strategies: Sequence[Strategy]) -> list[Estimate]:
        """What working off every strategy once may cost at most, in the order given.

        Where `max_trials` does not suffice for all, it counts for those whose attempts cost most. Later rounds, on
        recipes that were accepted, are bounded by `max_trials` and `max_minutes` alone.

        Raises:
            ConfigError: a strategy addresses what is no bottleneck, or its search makes no sense.
        """
        check(strategies)
        left = self.max_trials - _num_trials(history)
        attempts = {}
        for strategy in sorted(strategies, key=lambda each: -_cost(each, history)):
            attempts[strategy.name] = max(0, min(left, _max_attempts(strategy)))
            left -= attempts[strategy.name]
        return [
            Estimate(each.name, attempts[each.name], attempts[each.name] * _cost(each, history)) for each in strategies
        ]

    def _open_edit(self, strategy: Strategy, parent: int, history: Sequence[Trial], lent: _Lent) -> Edit | None:
        """The first edit of the strategy that is still to be tried on this recipe."""
        mine = [trial for trial in history if trial.parent == parent and trial.strategy == strategy.name]
        if declared := halving(strategy.search):
            before = history[: mine[0].number] if mine else history
            edits = declared.candidates(strategy.attempts)
            return self._race(declared, edits, parent, history, lent, self.max_trials - _num_trials(before)).next_edit()
        for attempt in strategy.attempts:
            if strategy.search:
                if edit := _open_value(strategy.search, attempt, parent, mine, lent.known):
                    return edit
            elif all(trial.edit != attempt for trial in mine) and lent.known(parent, attempt) is None:
                return attempt
        return None

    def _race(
        self, declared: Halving, edits: Sequence[Edit], parent: int, history: Sequence[Trial], lent: _Lent, trials: int
    ) -> Race:
        """A halving on the recipe of a trial, of as many of the edits as that many trials suffice for."""

        def admissible(edit: Edit) -> bool:
            return lent.inadmissible(parent, edit) is None

        return Race(
            halving=declared,
            edits=drawn(declared, [edit for edit in edits if admissible(declared.at(edit, 0))], trials),
            find=lambda edit: lent.same_recipe(parent, edit),
            admissible=admissible,
            history=history,
            gained=self._gained,
            merit=self._merit,
        )

    def _gained(self, trial: Trial) -> bool:
        """Whether it is surely better in what is optimised than the best before it."""
        if self._counts_bytes:
            return trial.measured_gain is not None and trial.measured_gain > 1
        ratio = trial.speedup.get("previous")
        return ratio is not None and ratio.low > 1

    def _merit(self, trial: Trial) -> float:
        """What is optimised, the more the better, against the same thing for all trials."""
        measured = trial.evaluation or trial.training
        if measured is None:
            return 0.0
        if trial.evaluation is not None and self._counts_bytes:
            return 1 / (trial.evaluation.size_bytes if self.optimize == "size" else trial.evaluation.memory_bytes)
        against = "plain" if self.optimize == TRAINING else "eager"
        return measured.speedup[against].value if against in measured.speedup else 1.0

    def _spent(self, history: Sequence[Trial]) -> str | None:
        if _num_trials(history) >= self.max_trials:
            return f"the budget of {self.max_trials} trials is spent (planner.max_trials)"
        minutes = sum(trial.seconds for trial in history[1:]) / 60
        if self.max_minutes is not None and minutes >= self.max_minutes:
            return f"the budget of {self.max_minutes:g} minutes is spent, {minutes:.3g} are used (planner.max_minutes)"
        return None

    @property
    def _counts_bytes(self) -> bool:
        return self.optimize in ("size", "memory")

    def _time_counts(self, best: Trial) -> bool:
        """Whether shorter requests bring the recipe nearer to what the objective asks for."""
        if self.optimize != "size":
            return True
        measured = best.evaluation
        if measured is None:
            return False
        too_slow = self.max_latency_ms is not None and measured.latency_ms["p50"].high > self.max_latency_ms
        return too_slow or (self.min_throughput is not None and measured.throughput.low < self.min_throughput)

    def _declared(self, strategy: Strategy, profile: Diagnosis) -> float:
        """The gain of what is optimised that the strategy declares."""
        return strategy.addresses.get("capacity", 1.0) if self._counts_bytes else declared_gain(strategy, profile)

    def _expected_gain(self, strategy: Strategy, profile: Diagnosis, history: Sequence[Trial]) -> float:
        factor = correction(strategy.name, (*self._taught, *lessons(history)))
        return math.exp(factor * math.log(self._declared(strategy, profile)))

    def _relieves(self, strategy: Strategy, profile: Diagnosis, best: Trial) -> bool:
        if self._counts_bytes and strategy.addresses.get("capacity", 1.0) > 1:
            return True
        return self._time_counts(best) and _relieves(strategy, profile)

    def _rank(
        self, strategy: Strategy, profile: Diagnosis, history: Sequence[Trial], best: Trial
    ) -> tuple[bool, float]:
        """Sorts ascending: what brings the files under a broken limit, then the most gain per second."""
        relief, benefit = _relief(strategy, profile), math.log(self._expected_gain(strategy, profile, history))
        if not self._counts_bytes:
            benefit += math.log(relief)
        elif self._time_counts(best):
            benefit += math.log(declared_gain(strategy, profile))
        return profile.bottleneck == "capacity" and relief <= 1, -benefit / _cost(strategy, history)

    def _step(
        self, strategy: Strategy, edit: Edit, parent: Trial, profile: Diagnosis, history: Sequence[Trial]
    ) -> Choice:
        expected, declared = self._expected_gain(strategy, profile, history), self._declared(strategy, profile)
        shares = _told(strategy, profile, _addressed(strategy, profile))
        if self._counts_bytes:
            shares = f"{self.optimize} (objective.optimize)" if declared > 1 else shares
        corrected = (
            "" if math.isclose(expected, declared) else f", corrected from {declared:.3g}x by its earlier trials"
        )
        return Choice(
            strategy=strategy.name,
            edit=edit,
            expected_gain=expected,
            why=f"addresses {shares}; expected {expected:.3g}x{corrected}, for {_cost(strategy, history):.3g} s",
            parent=parent.number,
        )

    def _obstacle(self, strategy: Strategy, profile: Diagnosis, best: Trial, inadmissible: Inadmissible) -> str:
        """Why a strategy is not chosen."""
        if not self._relieves(strategy, profile, best):
            if not self._time_counts(best):
                return f"{strategy.name} does not shrink the files (objective.optimize={self.optimize})"
            return f"{strategy.name} addresses what hardly matters ({_told(strategy, profile, strategy.addresses)})"
        for edit in covering(strategy):
            if reason := inadmissible(best.number, edit):
                return f"{strategy.name} is refused: {reason}"
        return f"{strategy.name} has nothing new to try on trial {best.number}"


def check(strategies: Iterable[Strategy]) -> None:
    """Raises ConfigError where a strategy addresses what is no bottleneck or no operator, or can't be searched."""
    problems = []
    for strategy in strategies:
        where = f"strategies.{strategy.name}"
        for name, factor in strategy.addresses.items():
            if name not in BOTTLENECKS:
                problems.append(f"{where}.addresses: {name!r} is no bottleneck; there are {', '.join(BOTTLENECKS)}")
            if not (math.isfinite(factor) and factor > 0):
                problems.append(f"{where}.addresses.{name} must be a factor above 0, got {factor}")
        for kind in strategy.operators or ():
            if kind not in KINDS:
                problems.append(f"{where}.operators: {kind!r} is no kind of operator; there are {', '.join(KINDS)}")
        problems += [f"{where}.{problem}" for problem in _search_problems(strategy)]
    if problems:
        raise ConfigError(*problems)


def _search_problems(strategy: Strategy) -> Iterator[str]:
    try:
        _max_attempts(strategy)
        declared = halving(strategy.search)
    except ConfigError as error:
        yield from error.problems
        return
    if declared:
        for text in declared.useless(strategy.attempts):
            yield f"search.halving.rungs: {text} is for no candidate, as none chooses {text.partition('.')[0]}"
    elif strategy.search and not isinstance(strategy.search.get("key"), str):
        yield "search.key must name the knob that is searched, such as pruning.sparsity"


def declared_gain(strategy: Strategy, profile: Diagnosis) -> float:
    """Amdahl's law: how much faster a request becomes when the time of each class shrinks by its factor."""
    left = 0.0
    for name, share in profile.shares.items():
        if name != "capacity":
            changed = _changed(strategy, profile, name)
            left += share - changed + changed / strategy.addresses.get(name, 1.0)
    return 1 / left


def _changed(strategy: Strategy, profile: Diagnosis, name: str) -> float:
    """The part of a bottleneck's share that lies in the operators which the strategy changes.

    The shares of compute and memory are parted as the time of the operators that are bound by them, others as the time
    of all operators.
    """
    share = profile.shares.get(name, 0.0)
    if name == "capacity" or strategy.operators is None:
        return share
    groups = [group for group in profile.operators if group.bound == name] or profile.operators
    whole = sum(group.share for group in groups)
    mine = sum(group.share for group in groups if group.kind in strategy.operators)
    return share * mine / whole if whole > 0 else share


def _told(strategy: Strategy, profile: Diagnosis, names: Iterable[str]) -> str:
    """The shares of these bottlenecks that the strategy changes, and of which operators."""
    shares = ", ".join(f"{name} {_changed(strategy, profile, name):.0%}" for name in names)
    return f"{shares} in {' and '.join(strategy.operators)} operators" if strategy.operators else shares


def _relief(strategy: Strategy, profile: Diagnosis) -> float:
    """By how much fewer bytes help: the strategy's factor, at most what a broken size limit asks for."""
    excess = profile.shares.get("capacity", 0.0) if profile.bottleneck == "capacity" else 0.0
    needed = 1 / (1 - excess) if excess < 1 else math.inf
    return max(1.0, min(strategy.addresses.get("capacity", 1.0), needed))


def _addressed(strategy: Strategy, profile: Diagnosis) -> list[str]:
    """The noticeable bottlenecks that a strategy relieves, the largest first."""
    shares = {name: _changed(strategy, profile, name) for name in profile.shares if name != "capacity"}
    found = [
        name
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= NOTICEABLE and strategy.addresses.get(name, 1.0) > 1
    ]
    return [*(["capacity"] if _relief(strategy, profile) > 1 else []), *found]


def _relieves(strategy: Strategy, profile: Diagnosis) -> bool:
    gains = declared_gain(strategy, profile) > 1 or _relief(strategy, profile) > 1
    return gains and bool(_addressed(strategy, profile))


def _num_trials(history: Sequence[Trial]) -> int:
    return sum(trial.number > 0 for trial in history)


def _cost(strategy: Strategy, history: Sequence[Trial]) -> float:
    """Expected seconds of one attempt: the mean of this run's, or what the strategy declares."""
    seconds = [trial.seconds for trial in history if trial.strategy == strategy.name]
    return max(1e-3, sum(seconds) / len(seconds) if seconds else strategy.cost)


def _begun(history: Sequence[Trial], strategies: Sequence[Strategy]) -> tuple[Strategy, Trial] | None:
    """The strategy of the last trial and the trial whose recipe it edits."""
    if not history:
        return None
    last = history[-1]
    strategy = next((each for each in strategies if each.name == last.strategy), None)
    parent = next((trial for trial in history if trial.number == last.parent), None)
    return (strategy, parent) if strategy and parent else None


def _max_attempts(strategy: Strategy) -> int:
    """Trials that working off the strategy on one recipe takes at most."""
    if declared := halving(strategy.search):
        return max_trials(declared, len(declared.candidates(strategy.attempts)))
    return len(strategy.attempts) * (max_values(strategy.search) if strategy.search else 1)


@dataclass(frozen=True, kw_only=True)
class _Lent:
    """What the loop lends to the planner."""

    same_recipe: SameRecipe
    inadmissible: Inadmissible

    def known(self, parent: int, edit: Edit) -> bool | None:
        """Whether the recipe holds its constraints, where that is known without a trial."""
        if self.inadmissible(parent, edit):
            return False
        same = self.same_recipe(parent, edit)
        return same.holds if same else None


def _open_value(
    search: Mapping[str, Any], attempt: Edit, parent: int, mine: Sequence[Trial], known: Known
) -> Edit | None:
    """The attempt with the next value of the search; values whose outcome is known are passed over."""
    spelling = f"{search['key']}="
    observed = [
        (float(trial.edit[-1].removeprefix(spelling)), trial.holds)
        for trial in mine
        if trial.edit[:-1] == attempt and trial.edit[-1].startswith(spelling)
    ]
    while (value := next_value(search, observed)) is not None:
        edit = (*attempt, f"{spelling}{value:.10g}")
        holds = known(parent, edit)
        if holds is None:
            return edit
        observed.append((value, holds))
    return None
