"""`hasten ui`: the MLflow UI on the record of the runs, until Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hasten.session import Session
from hasten.tracking.ui import serve

SECTIONS = ("pipeline", "tracking", "ui", "hydra", "experiment", "debug")


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The request without its recipe: nothing is run."""
    return Session.of_part(overrides, SECTIONS, folder)


def main(session: Session) -> int:
    """The command; its exit code.

    Raises:
        ConfigError: there is nothing to open, or the port is taken.
        HastenError: MLflow's server ended by itself.
    """
    tracker, node = session.mlflow, session.recipe.config["ui"]
    serve(tracker.uri, tracker.artifacts, host=node["host"], port=node["port"], told=print)
    return 0
