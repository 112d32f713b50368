"""`hasten profile`: profiles one recipe on the target and names its bottleneck."""

from __future__ import annotations

from hasten.core.files import write_json
from hasten.core.training_objective import TRAINING
from hasten.core.trial import Profile, StepProfile
from hasten.reporting.plots import save_roofline
from hasten.session import Session


def main(session: Session) -> int:
    """The command; its exit code."""
    if session.recipe.config["dry_run"]:
        session.show_plan()
        return 0
    title = " ".join(session.recipe.overrides) or "the experiment as it is"
    if session.speeds == TRAINING:
        session.screen.step_profile(profile_training(session), title)
    else:
        session.screen.profile(run(session), title)
    return 0


def profile_training(session: Session) -> StepProfile:
    """Prepares the rows and profiles the recipe's training step; leaves `profile.json`.

    Raises:
        HastenError: it can't be trained.
    """
    session.ready()
    with session.screen:
        profile = session.training_bench.profile(session.training_bench.prepared(session.recipe))
    write_json(session.folder / "profile.json", profile.to_dict())
    return profile


def run(session: Session) -> Profile:
    """Builds the recipe, measures its latency and profiles it; leaves `profile.json` and `roofline.png`.

    Raises:
        HastenError: it can't be built, or its engine can't be profiled.
    """
    session.ready()
    with session.screen:
        bench = session.request_bench
        built, evaluation, _ = bench.evaluate(session.recipe, references={}, baseline=None)
        profile = bench.profile(built, evaluation)
    write_json(session.folder / "profile.json", profile.to_dict())
    save_roofline(f"{session.name}, {session.recipe.option('engine')}", profile, session.folder / "roofline.png")
    return profile
