"""`hasten`: goes round the loop until the goal is reached, the budget is spent or nothing helps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.recipe import Recipe
from hasten.core.training_objective import TRAINING
from hasten.core.trial import Choice, Result, Strategy, TrainingResult, Trial
from hasten.outcome import conclude
from hasten.session import Candidate, Session, UntouchedEngine
from hasten.training_outcome import conclude_training

log = logging.getLogger(__name__)

INTERRUPTED = 130


def main(session: Session) -> int:
    """The command; its exit code."""
    if session.recipe.config["dry_run"]:
        session.show_plan(session.strategies)
        return 0
    result = optimize(session)
    session.screen.summary(result)
    return INTERRUPTED if result.stopped == "interrupted" else 0


def optimize(session: Session) -> Result | TrainingResult:
    """Measures the baseline, then lets strategies edit the best recipe so far.

    Raises:
        HastenError: the baseline can't be built or measured.
    """
    strategies = session.strategies
    session.show_estimate(session.ready(), strategies)
    with session.opened(), session.screen:
        baseline = session.baseline()
        loop = Loop(session=session, strategies=strategies, engine=session.eager_engine(baseline))
        try:
            if session.speeds != TRAINING:
                loop.engine = session.best_untouched_engine(baseline)
            loop.given()
            stopped = loop.go_round()
        except KeyboardInterrupt:
            stopped = "interrupted"
        if session.speeds == TRAINING:
            return conclude_training(session, loop.best, stopped=stopped)
        return conclude(session, loop.best, engine=loop.engine, stopped=stopped)


@dataclass(kw_only=True)
class Loop:
    """Profile, bottleneck, strategy, apply, evaluate, verdict; round and round.

    Attributes:
        engine: the untouched model in its best engine.
    """

    session: Session
    strategies: tuple[Strategy, ...]
    engine: UntouchedEngine

    @property
    def best(self) -> Candidate:
        """The last accepted candidate, which strategies edit. Read off the history, so that Ctrl-C loses nothing."""
        accepted = [candidate for candidate in self.session.candidates if candidate.trial.verdict == "accepted"]
        return accepted[-1]

    def given(self) -> None:
        """Tries the recipe that the user's own overrides declare, where it is not the untouched model."""
        choice = self.session.given()
        if choice.edit and self.session.recipe.identity != self.session.untouched.identity:
            self._try(choice)

    def go_round(self) -> str:
        """Tries what the planner chooses until it chooses nothing; says why it stopped."""
        session, planner = self.session, self.session.planner
        while True:
            history = [candidate.trial for candidate in session.candidates]
            if self._goal_reached():
                return "goal reached"
            profile, best = self.best.diagnosis, self.best.trial
            same_recipe, inadmissible = self._same_recipe, self._inadmissible
            choice = planner.choose(
                history, profile, self.strategies, best, same_recipe=same_recipe, inadmissible=inadmissible
            )
            if choice is None:
                return planner.why_stopped(
                    history, profile, self.strategies, best, same_recipe=same_recipe, inadmissible=inadmissible
                )
            log.debug("%s: %s", choice.strategy, choice.why)
            self._try(choice)

    def _try(self, choice: Choice) -> None:
        references = self.session.references(self.best, self.engine)
        cost = next((strategy.cost for strategy in self.strategies if strategy.name == choice.strategy), 0.0)
        self.session.attempt(choice, references, self.best, failed_seconds=cost)

    def _goal_reached(self) -> bool:
        training = self.session.speeds == TRAINING
        goal = (self.session.training_objective if training else self.session.objective).goal_speedup
        ratio = self.best.trial.speedup.get("plain" if training else "eager")
        return goal is not None and ratio is not None and ratio.low >= goal

    def _same_recipe(self, parent: int, edit: tuple[str, ...]) -> Trial | None:
        """The trial of the history that has the recipe which the edit gives."""
        identity = self._edited(parent, edit).identity
        return next((made.trial for made in self.session.candidates if made.recipe.identity == identity), None)

    def _inadmissible(self, parent: int, edit: tuple[str, ...]) -> str | None:
        engines = self.session.target.engines
        if strangers := [text for text in edit if text.startswith("engine=") and text[7:] not in engines]:
            return f"{strangers[0]} is not among target.engines ({', '.join(engines)})"
        try:
            return self.session.inadmissible(self._edited(parent, edit))
        except ConfigError as error:
            return str(error)

    def _edited(self, parent: int, edit: tuple[str, ...]) -> Recipe:
        return self.session.composer.edited(self.session.candidates[parent].recipe, edit)
