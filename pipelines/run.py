"""`hasten run`: builds and measures one recipe, against the untouched model."""

from __future__ import annotations

from hasten.core.trial import Result
from hasten.outcome import conclude
from hasten.session import Session


def main(session: Session) -> int:
    """The command; its exit code is 1 where the recipe failed."""
    if session.recipe.config["dry_run"]:
        session.show_plan()
        return 0
    result = run(session)
    session.screen.summary(result)
    return 1 if result.trials[-1].verdict == "failed" else 0


def run(session: Session) -> Result:
    """Builds the baseline and the recipe, measures both in turns and judges the recipe.

    Raises:
        HastenError: the baseline can't be built or measured.
    """
    session.ready()
    with session.opened(), session.screen:
        baseline = session.baseline()
        engine = session.best_untouched_engine(baseline)
        best = baseline
        if session.recipe.identity != session.untouched.identity:
            references = {"eager": baseline.built, "engine": engine.built, "previous": baseline.built}
            candidate = session.attempt(session.given(), references, baseline)
            best = candidate if candidate.trial.verdict != "failed" else baseline
        return conclude(session, best, engine=engine, stopped="one recipe")
