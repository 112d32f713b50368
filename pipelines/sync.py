"""`hasten sync`: logs what earlier runs could not, because the tracking store was away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hasten.core.errors import ConfigError
from hasten.session import Session

SECTIONS = ("pipeline", "tracking", "runs", "hydra", "experiment", "debug")


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request without its recipe, which has been run already."""
    return Session.of_part(overrides, SECTIONS, folder)


def main(session: Session) -> int:
    """The command; its exit code.

    Raises:
        ConfigError: a folder is none.
        HastenError: the store is still away.
    """
    folders = [Path(folder) for folder in session.recipe.config["runs"]]
    if strangers := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"runs: {', '.join(strangers)} is no folder of a run")
    logged = session.mlflow.sync(folders)
    for folder, number in logged.items():
        print(f"{folder}: {number} record{'' if number == 1 else 's'} logged")
    if not logged:
        print("nothing was waiting to be logged")
    return 0
