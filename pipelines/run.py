"""`hasten run`: builds and measures one recipe, against the untouched model."""

from __future__ import annotations

from hasten.core.training_objective import TRAINING
from hasten.core.trial import Result, TrainingResult
from hasten.outcome import conclude
from hasten.session import Session
from hasten.training_outcome import conclude_training


def main(session: Session) -> int:
    """The command; its exit code is 1 where the recipe failed."""
    if session.recipe.config["dry_run"]:
        session.show_plan()
        return 0
    result = run(session)
    session.screen.summary(result)
    return 1 if result.trials[-1].verdict == "failed" else 0


def run(session: Session) -> Result | TrainingResult:
    """Builds the baseline and the recipe, measures both in turns and judges the recipe: its requests, or its training.

    Raises:
        HastenError: the baseline can't be built or measured.
    """
    session.ready()
    with session.opened(), session.screen:
        baseline = session.baseline()
        training = session.speeds == TRAINING
        engine = session.eager_engine(baseline) if training else session.best_untouched_engine(baseline)
        best = baseline
        if session.recipe.identity != session.untouched.identity:
            candidate = session.attempt(session.given(), session.references(baseline, engine), baseline)
            best = candidate if candidate.trial.verdict != "failed" else baseline
        if training:
            return conclude_training(session, best, stopped="one recipe")
        return conclude(session, best, engine=engine, stopped="one recipe")
