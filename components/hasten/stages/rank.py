"""One of the processes that train together: `torchrun -m hasten.stages.rank FOLDER SHA256`.

It is started for `stages.group`, which wrote what is to be trained into the folder and reads there what came of it.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import HastenError
from hasten.core.files import read_json, write_json, write_text
from hasten.core.interpreter import leave_with_parent
from hasten.core.recipe import Recipe
from hasten.core.sections import Distributed
from hasten.distributed.checkpoint import write_weights
from hasten.distributed.group import joined
from hasten.stages.group import JOB, MODEL, PROGRESS, REFUSAL, RESULT, WEIGHTS
from hasten.stages.stage import Tools
from hasten.stages.training import StageBench


class ProgressFile:
    """Tells a `Progress` in another process of the steps."""

    def __init__(self, file: Path) -> None:
        self._file, self._done, self._total = file, 0, 0

    def start(self, what: str, total: int) -> None:
        self._done, self._total = 0, total

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{self._done} {self._total}")  # only looked at: it may be lost
        partial.replace(self._file)

    def stop(self) -> None:
        """There is nothing to end."""


def main() -> None:
    folder, expected = Path(sys.argv[1]), sys.argv[2]
    if (folder / REFUSAL).exists():
        return  # another attempt would be refused in the same way
    job = read_json(folder / JOB)
    leave_with_parent()
    try:
        _train(job, _model(folder / MODEL, expected), folder)
    except HastenError as error:
        write_json(folder / REFUSAL, {"reason": " ".join(str(error).split())})
        raise
    except Exception:
        write_text(folder / f"error-{os.environ['RANK']}.txt", traceback.format_exc())
        raise


def _model(file: Path, expected: str) -> torch.nn.Module:
    """The model as the parent pickled it; nothing else is unpickled."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise HastenError(f"{file} is not what it was when the training was started: its SHA-256 does not match")
    model = torch.load(io.BytesIO(content), weights_only=False)
    assert isinstance(model, torch.nn.Module)
    return model


def _train(job: Mapping[str, Any], model: torch.nn.Module, folder: Path) -> None:
    recipe = Recipe(overrides=(), config=job["recipe"])
    with joined(Distributed.of(recipe.config["distributed"])) as group:
        first = group.rank == 0
        progress = {"progress": ProgressFile(folder / PROGRESS)} if first else {}
        bench = StageBench(
            recipe=recipe,
            section=job["section"],
            what=job["what"],
            inputs={name: Path(path) for name, path in job["inputs"].items()},
            folder=Path(job["folder"]),
            tools=Tools(checkpoint_seconds=job["checkpoint_seconds"], **progress),
        )
        fitted = bench.fitted(model, distil=job["distil"], resume=Path(job["resume"]), group=group)
        write_weights(folder / WEIGHTS, fitted.model, group)
        if first:
            write_json(folder / RESULT, {"curves": fitted.curves, "cache": fitted.cache, "notes": fitted.notes})


if __name__ == "__main__":
    main()
