"""`hasten place`: divides one model between the devices of the target, and says what that gives."""

from __future__ import annotations

import shutil

from hasten.core.errors import ConfigError
from hasten.core.files import read_json
from hasten.reporting.placement import PLACEMENT, sentences, tables, write_chart
from hasten.session import Session

PLACED = "engine=placed"


def main(session: Session) -> int:
    """The command; its exit code."""
    from hasten.stages.build import build, plan
    from hasten.stages.engine import is_placed
    from hasten.stages.stage import Tools

    recipe = session.recipe if is_placed(session.recipe) else session.composer.edited(session.recipe, [PLACED])
    if reason := session.inadmissible(recipe):
        raise ConfigError(reason)
    if session.recipe.config["dry_run"]:
        planned = plan(recipe, session.store)
        session.screen.stages(
            [(it.stage.name, it.key, it.entry is not None, it.entry.seconds if it.entry else None) for it in planned]
        )
        return 0
    with session.screen:
        built = build(recipe, session.store, Tools(progress=session.screen))
    found = read_json(built.compiled.folder / PLACEMENT)
    session.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(built.compiled.folder / PLACEMENT, session.folder / PLACEMENT)
    for title, columns, rows in tables(found):
        session.screen.table(title, columns, rows)
    session.screen.lines([*sentences(found), *write_chart(found, session.folder)])
    return 0
