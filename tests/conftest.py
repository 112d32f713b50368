"""What all tests share: a clean working directory, and Hydra as a command line starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Wall time is never asserted: a busy machine is no failure.
settings.register_profile("hasten", deadline=None)
settings.load_profile("hasten")

# As the command line does, before torch is loaded: its threads shall not spin for long on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of an experiment that trains in a second and keeps no record, and one store for the whole session.

    What one test has built and measured the others find there: no stage is made twice, whoever asks first.
    """
    return (
        "model.arch.widths=[8]",
        "model.arch.num_blocks=1",
        "trainer.epochs=3",
        "trainer.batch_size=16",
        "trainer.lr=0.02",
        "trainer.threads=1",
        "target.engines=[eager,onnxruntime]",
        "tracking=none",
        f"store.folder={tmp_path_factory.mktemp('shared') / 'store'}",
    )


@pytest.fixture
def hydra() -> Iterator[None]:
    """The packaged configs, ready to be composed."""
    from hydra import initialize_config_module

    from hasten.core import schema

    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, since setuptools writes beside what it builds."""
    root = Path(__file__).resolve().parents[1]
    copy, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for folder in ("components", "pipelines", "conf"):
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / file, copy / file)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    made = subprocess.run([*pip, "--wheel-dir", str(built), str(copy)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    (file,) = built.iterdir()
    return file
