"""Chooses recipes out of a declared space by what Optuna's samplers learn from those before.

Every choice is a function of the history alone: the study is built anew from it each time and lives no longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from hasten.core.interfaces import Edit, Inadmissible, Planner, SameRecipe
from hasten.core.objective import Objective, excesses
from hasten.core.search_space import SearchSpace
from hasten.core.training_objective import TRAINING
from hasten.core.trial import Choice, Diagnosis, Estimate, Strategy, Trial
from hasten.planning.sampling import Sampler, require_optuna, sampler, suggested

if TYPE_CHECKING:
    import optuna

SEARCH = "search"
"""What trials of this planner have in place of a strategy."""
MAX_LEARNED = 40
"""Proposals of the sampler in a row that may lead to nothing new before points are drawn at random."""
MAX_PROPOSALS = 300
"""Proposals in a row that may lead to nothing new before the space counts as searched."""

MAX_EXCESS = 1e6
"""How much worse than allowed what can't be compared counts: samplers add up what is broken."""


@dataclass(frozen=True, kw_only=True)
class OptunaPlanner(Planner):
    """Asks Optuna for the next point of a space; each is an edit of the untouched model.

    Proposals that make no sense, or give a recipe of the history, cost no trial: the study is told, and asked again.
    A sampler is told what is optimised on a logarithmic scale, against the untouched model, and every constraint of
    the objective as a constraint.

    Attributes:
        space: what is chosen from (`core.search_space`).
        sampler: who proposes (`planning.sampling.Sampler`).
        startup_trials: of tpe, drawn at random before it learns; of nsga2, the size of a generation.
        seed: of the sampler.
        max_trials: trials without the baseline.
        max_minutes: budget of recorded cost of the trials, without the baseline; None for none.
        cost: expected seconds of one trial where nothing has been measured yet.
        optimize: the objective's; the limits likewise.

    Raises:
        ConfigError: Optuna is not installed, or the space is not spelt as it has to be.
    """

    space: Mapping[str, Any] = field(hash=False)
    sampler: Sampler = "tpe"
    startup_trials: Annotated[int, Ge(1)] = 6
    seed: Annotated[int, Ge(0)] = 0
    max_trials: Annotated[int, Ge(1)] = 24
    max_minutes: Annotated[float, Gt(0)] | None = None
    cost: Annotated[float, Gt(0)] = 20
    optimize: Literal["p50", "p90", "p99", "throughput", "size", "memory", "training"] = "p50"
    max_latency_ms: Annotated[float, Gt(0)] | None = None
    min_throughput: Annotated[float, Gt(0)] | None = None
    max_size_mb: Annotated[float, Gt(0)] | None = None
    max_memory_mb: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        require_optuna("planner=optuna")
        space = self._space  # what can't be searched is told before anything has been trained
        if self.sampler == "grid":
            space.grid()

    @cached_property
    def _space(self) -> SearchSpace:
        return SearchSpace.of(self.space)

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
        """The next point that makes sense and is new; strategies are not asked."""
        if self._spent(history):
            return None
        study, told = self._study(history)
        for edit in self._proposals(study, len(history)):
            if inadmissible(0, edit) is None and same_recipe(0, edit) is None:
                learned = f"from {told} trials of the space" if told else "before anything was learned"
                return Choice(
                    strategy=SEARCH, parent=0, edit=edit, expected_gain=None, why=f"{self.sampler}, {learned}"
                )
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
        if spent := self._spent(history):
            return spent
        if self.sampler == "grid":
            return "every point of the space has been tried or refused (planner.space)"
        return f"{MAX_PROPOSALS} proposals in a row were tried before or refused (planner.space)"

    def estimate(self, history: Sequence[Trial], strategies: Sequence[Strategy]) -> list[Estimate]:
        """All trials of the search, at what those so far took or `cost`."""
        seconds = [trial.seconds for trial in history if trial.strategy == SEARCH]
        left = max(0, self.max_trials - _num_trials(history))
        return [Estimate(SEARCH, left, left * (sum(seconds) / len(seconds) if seconds else self.cost))]

    def _spent(self, history: Sequence[Trial]) -> str | None:
        if _num_trials(history) >= self.max_trials:
            return f"the budget of {self.max_trials} trials is spent (planner.max_trials)"
        minutes = sum(trial.seconds for trial in history[1:]) / 60
        if self.max_minutes is not None and minutes >= self.max_minutes:
            return f"the budget of {self.max_minutes:g} minutes is spent, {minutes:.3g} are used (planner.max_minutes)"
        return None

    def _proposals(self, study: optuna.Study, number: int) -> Iterator[Edit]:
        if self.sampler == "grid":
            yield from (point.edit for point in self._space.grid())
            return
        for asked in range(MAX_PROPOSALS):
            if asked == MAX_LEARNED:  # it has settled on what is known
                study.sampler = sampler("random", seed=self._seed(number), startup_trials=self.startup_trials)
            # What leads to nothing new stays open: the sampler counts it as bad, and looks elsewhere the next time.
            yield suggested(self._space, study.ask()).edit

    def _study(self, history: Sequence[Trial]) -> tuple[optuna.Study, int]:
        """What a sampler may learn from, and of how many trials that is."""
        import optuna
        from optuna.trial import TrialState

        proposer = sampler(self.sampler, seed=self._seed(len(history)), startup_trials=self.startup_trials)
        study = optuna.create_study(direction="minimize", sampler=proposer)
        tried = [trial for trial in history[1:] if trial.parent == 0]
        known = [(trial, values) for trial in tried if (values := self._space.values_of(trial.edit)) is not None]
        for made, values in known:
            # Asked for once more, not only added: a sampler may keep books of what it proposed.
            study.enqueue_trial(dict(values))
            trial = study.ask()
            suggested(self._space, trial)
            if made.evaluation is None and made.training is None:
                study.tell(trial, state=TrialState.PRUNED)
                continue
            for name, excess in self._excesses(made):
                trial.set_constraint(name, excess)
            study.tell(trial, self._loss(made))
        return study, len(known)

    def _seed(self, number: int) -> int:
        """Another one for each trial, as the sampler is made anew."""
        return (self.seed * 10_007 + number) % 2**32

    def _loss(self, trial: Trial) -> float:
        """Logarithm of what is optimised, the less the better, against the untouched model where that is measured."""
        measured = trial.evaluation
        if measured is not None and self.optimize == "size":
            return math.log(measured.size_bytes)
        if measured is not None and self.optimize == "memory":
            return math.log(measured.memory_bytes)
        # Of a small model beside eager PyTorch, what else the machine does changes the ratio by factors; beside the
        # untouched model in its best engine, which is about as quick, by some per cent.
        for against in ("plain",) if self.optimize == TRAINING else ("engine", "eager"):
            if against in trial.speedup:
                return -math.log(trial.speedup[against].value)
        return math.log(measured.latency_ms["p50"].value) if measured is not None else 0.0  # of an emulated device

    def _excesses(self, trial: Trial) -> Iterator[tuple[str, float]]:
        if trial.evaluation is not None:
            found = excesses(trial.evaluation, self._objective)
            yield from ((name, min(excess, MAX_EXCESS)) for name, excess in found.items())
            # What is left for it to break is the share of integers that its quantization asks for.
            yield "integer_share", float(not trial.holds and all(excess <= 0 for excess in found.values()))
        elif trial.training is not None:
            yield "loss", 0.0 if trial.training.loss is None or trial.training.loss.holds else 1.0
            if self.max_memory_mb is not None:
                yield "memory", trial.training.memory_bytes / 1e6 / self.max_memory_mb - 1

    @cached_property
    def _objective(self) -> Objective:
        limits = {name: getattr(self, name) for name in LIMITS}
        return Objective(optimize="p50" if self.optimize == "training" else self.optimize, **limits)


LIMITS = ("max_latency_ms", "min_throughput", "max_size_mb", "max_memory_mb")
"""What the objective may limit, beside the quality, of which an evaluation brings its own limit along."""


def _num_trials(history: Sequence[Trial]) -> int:
    return sum(trial.number > 0 for trial in history)
