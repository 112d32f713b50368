"""The config groups, their options and what each option is for, read from the first comment of its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

GROUPS = (
    "pipeline",
    "data",
    "task",
    "model",
    "student",
    "distillation",
    "pruning",
    "quantization",
    "engine",
    "target",
    "loader",
    "trainer",
    "distributed",
    "callbacks",
    "objective",
    "planner",
    "strategy",
    "space",
    "hparams_search",
    "tracking",
    "experiment",
    "debug",
)


def conf_folder() -> Path:
    """Where the packaged configs lie."""
    from hasten import conf

    return Path(conf.__path__[0])


def options(group: str, folders: Sequence[Path]) -> dict[str, str]:
    """Option -> what it is for, over all config folders; a user's option hides a packaged one of the same name."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((folder / group).glob("*.yaml")):
            found.setdefault(file.stem, _first_comment(file))
    return dict(sorted(found.items()))


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""
