"""Many candidates tried cheaply, the best share of them again at a higher cost, the last few in earnest.

Successive halving (Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization,
AISTATS 2016), with one difference: what costs little here is a candidate that has not been trained, whose quality is a
guess but whose speed is what it will be. So those that gain nothing go first, whatever their quality.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.core.interfaces import Edit
from hasten.core.search import Halving
from hasten.core.trial import Trial

Find = Callable[[Edit], Trial | None]
Entrant = tuple[Edit, float]
"""A candidate of a rung and its merit, as far as a rung before has measured it; else infinite."""
Runner = tuple[Edit, Trial]
"""A candidate and its trial at a rung."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """One successive halving on one recipe. Every answer is a function of the history.

    Attributes:
        edits: the candidates that make sense on the recipe.
        find: the trial of the history that has the recipe which an edit gives; None if it is new.
        admissible: whether an edit makes sense.
        history: all trials in their order.
        gained: whether a trial is surely better in what is optimised than the best before it.
        merit: what is optimised, the more the better, on one scale for all trials that were measured.
    """

    halving: Halving
    edits: Sequence[Edit]
    find: Find
    admissible: Callable[[Edit], bool]
    history: Sequence[Trial]
    gained: Callable[[Trial], bool]
    merit: Callable[[Trial], float]

    def next_edit(self) -> Edit | None:
        """What to try next; None where the race is over."""
        entrants: list[Entrant] = [(edit, math.inf) for edit in self.edits]
        for rung in range(len(self.halving.rungs)):
            tried: list[Runner] = []
            for candidate, merit in entrants:
                edit = self.halving.at(candidate, rung)
                if trial := self.find(edit):
                    tried.append((candidate, trial))
                elif self.admissible(edit) and not self._is_beaten(merit):
                    return edit
            open_ended = [runner for runner in tried if self._goes_on(*runner, rung)]
            entrants = self._survivors(tried, open_ended, kept(len(entrants), self.halving.keep))
        return None

    def _is_beaten(self, merit: float) -> bool:
        """Whether something as good has been accepted: training the candidate would not make it any better."""
        return any(self.merit(trial) >= merit for trial in self.history if _is_accepted(trial))

    def _goes_on(self, candidate: Edit, trial: Trial, rung: int) -> bool:
        """Whether it gains anything, and a later rung would make another recipe of it."""
        if trial.evaluation is None or not self.gained(trial):
            return False
        later = (self.halving.at(candidate, rung) for rung in range(rung + 1, len(self.halving.rungs)))
        return any(self.find(edit) != trial for edit in later)

    def _survivors(self, tried: Sequence[Runner], open_ended: Sequence[Runner], num_kept: int) -> list[Entrant]:
        """The candidates that go on, the most promising first.

        Those that hold every constraint come first, by what is optimised; the others by how much quality they lose.
        What is accepted after the rung's last trial does not count: a rung that has ended is judged once and for all.
        """
        end = max((trial.number for _, trial in tried), default=0)
        accepted = [self.merit(trial) for trial in self.history if _is_accepted(trial) and trial.number <= end]
        to_beat = max(accepted, default=0.0)
        better = [runner for runner in open_ended if self.merit(runner[1]) > to_beat]
        ranked = sorted(better, key=lambda runner: self._rank(runner[1]))
        return [(candidate, self.merit(trial)) for candidate, trial in ranked[:num_kept]]

    def _rank(self, trial: Trial) -> tuple[bool, float]:
        assert trial.evaluation is not None
        lost = trial.evaluation.drop.value if trial.evaluation.drop is not None else 0.0
        return not trial.holds, -self.merit(trial) if trial.holds else lost


def kept(num_candidates: int, keep: float) -> int:
    """How many of a rung's candidates go on: the share, rounded down, and at least one."""
    return max(1, math.floor(num_candidates * keep + 1e-9))


def max_trials(halving: Halving, num_candidates: int) -> int:
    """Trials of all rungs together, at most."""
    total = 0
    for _ in halving.rungs:
        total += num_candidates
        num_candidates = kept(num_candidates, halving.keep)
    return total


def drawn(halving: Halving, edits: Sequence[Edit], trials: int) -> list[Edit]:
    """As many of the candidates as so many trials suffice for, in their order.

    They are drawn at random, as the paper draws its arms, but always the same, and fewer are a part of more.
    """
    fitting = (number for number in range(len(edits), 0, -1) if max_trials(halving, number) <= trials)
    order = random.Random(0).sample(range(len(edits)), len(edits))
    return [edits[place] for place in sorted(order[: next(fitting, 1)])]


def _is_accepted(trial: Trial) -> bool:
    return trial.verdict == "accepted" and trial.evaluation is not None
