"""`hasten profile`: profiles one recipe on the target and names its bottleneck."""

from __future__ import annotations

from hasten.core.files import write_json
from hasten.core.trial import Profile
from hasten.reporting.plots import save_roofline
from hasten.session import Session


def main(session: Session) -> int:
    """The command; its exit code."""
    if session.recipe.config["dry_run"]:
        session.show_plan()
        return 0
    profile = run(session)
    session.screen.profile(profile, title=" ".join(session.recipe.overrides) or "the experiment as it is")
    return 0


def run(session: Session) -> Profile:
    """Builds the recipe, measures its latency and profiles it; leaves `profile.json` and `roofline.png`.

    Raises:
        HastenError: it can't be built, or its engine can't be profiled.
    """
    session.ready()
    with session.screen:
        built, evaluation, _ = session.bench.evaluate(session.recipe, references={}, baseline=None)
        profile = session.bench.profile(built, evaluation)
    write_json(session.folder / "profile.json", profile.to_dict())
    save_roofline(f"{session.name}, {session.recipe.option('engine')}", profile, session.folder / "roofline.png")
    return profile
