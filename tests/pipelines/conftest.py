"""The command line as a person meets it: what was typed, what was printed, what was left."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten import cli


@dataclass(frozen=True, kw_only=True)
class Done:
    """One command line that has ended."""

    code: int
    folder: Path
    printed: str
    told: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


Hasten = Callable[..., Done]


@pytest.fixture(scope="session")
def hasten(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Hasten:
    """Runs `hasten WORDS... OVERRIDES...` on the tiny experiment, in a folder of its own."""

    def typed(*arguments: str) -> Done:
        folder = tmp_path_factory.mktemp("run") / "left"
        printed, told = StringIO(), StringIO()
        mine = {argument.partition("=")[0] for argument in arguments}
        shared = [
            override
            for override in tiny
            if override.partition("=")[0] not in mine and not ("model" in mine and override.startswith("model.arch."))
        ]
        with redirect_stdout(printed), redirect_stderr(told):
            code = cli.run([*arguments, *shared, f"hydra.run.dir={folder}"])
        return Done(code=code, folder=folder, printed=printed.getvalue(), told=told.getvalue())

    return typed


@pytest.fixture(scope="session")
def store(tiny: tuple[str, ...]) -> Path:
    return Path(tiny[-1].partition("=")[2])


@pytest.fixture(scope="session")
def ran(hasten: Hasten) -> Done:
    """`hasten run engine=onnxruntime`."""
    return hasten("run", "engine=onnxruntime")


def _created(store: Path) -> dict[str, float]:
    manifests = {path.parent: json.loads(path.read_text()) for path in store.glob("*/*/stage.json")}
    return {f"{folder.parent.name}/{folder.name}": manifest["created"] for folder, manifest in manifests.items()}


@pytest.fixture(scope="session")
def created() -> Callable[[Path], dict[str, float]]:
    """Stage and key of everything finished in a store -> when it was made."""
    return _created


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npz file with rows of 12 features and labels that have nothing to do with them."""
    generator = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("rows") / "features.npz"
    np.savez(file, inputs=generator.normal(size=(400, 12)), targets=generator.permutation(400) % 3)
    return file
