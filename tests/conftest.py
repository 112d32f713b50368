"""What all tests share: a clean working directory, and Hydra as a command line starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def training_result() -> Any:
    """A made-up run that made a training faster: one step accepted, one rejected, one failed."""
    from hasten.core.trial import Interval, LossCurves, StepProfile, TrainingEvaluation, TrainingResult, Trial

    def evaluation(rows: float, plain: float | None, previous: float | None, loss: LossCurves | None) -> Any:
        ratios = {"plain": plain, "previous": previous}
        return TrainingEvaluation(
            samples_per_second=Interval(value=rows, low=0.97 * rows, high=1.04 * rows),
            step_ms=Interval(value=128e3 / rows, low=127e3 / rows, high=129e3 / rows),
            batch_size=128,
            speedup={name: Interval(value=it, low=it - 0.1, high=it + 0.1) for name, it in ratios.items() if it},
            references={},
            memory_bytes=420_000_000,
            start_seconds=4.2,
            loss=loss,
            notes=("154 MB of training rows are <kept> in memory.",),
        )

    curves = LossCurves(
        holds=True,
        rows=(640, 1280),
        baseline=(2.1, 1.8),
        limit=(2.2, 1.95),
        candidate=(2.1, 1.82),
        num_seeds=(4, 2),
        reason="within the seeds' spread up to row 1280: loss 1.82 against 1.8 of the baseline",
    )
    profile = StepProfile(
        step_ms=140.0,
        phases_ms={"data": 70.0, "transfer": 0.0, "forward": 25.0, "backward": 40.0, "optimizer": 4.0, "other": 1.0},
        shares={"data": 0.5, "transfer": 0.0, "compute": 0.3, "memory": 0.1, "overhead": 0.1},
        bottleneck="data",
        evidence=("50% of a step waits for the next batch (70 ms of 140 ms)",),
    )
    plain = ("loader=plain",)
    common = {"parent": 0, "bottleneck": "data", "rebuild": "hasten run objective=training loader=plain"}
    baseline = Trial(
        number=0,
        parent=None,
        overrides=plain,
        edit=(),
        strategy="baseline",
        bottleneck="",
        verdict="accepted",
        reason="its training as it is, in eager PyTorch",
        training=evaluation(910.0, None, None, None),
        step_profile=profile,
        rebuild=common["rebuild"],
    )
    prepared = Trial(
        number=1,
        overrides=(),
        edit=("loader=default",),
        strategy="prepare_rows",
        verdict="accepted",
        reason="2.00x the rows per second of the best before",
        expected_gain=1.9,
        measured_gain=2.0,
        training=evaluation(1820.0, 2.0, 2.0, curves),
        step_profile=profile,
        **common,
    )
    larger = Trial(
        number=2,
        overrides=("trainer.batch_factor=4",),
        edit=("trainer.batch_factor=4",),
        strategy="larger_batch",
        verdict="rejected",
        reason="faster, but it does not learn as well",
        training=evaluation(2000.0, 2.2, 1.1, curves),
        **common,
    )
    failed = Trial(
        number=3,
        overrides=("trainer.compile=default",),
        edit=("trainer.compile=default",),
        strategy="compiled_step",
        verdict="failed",
        reason="no <compiler>",
        **common,
    )
    return TrainingResult(
        experiment="digits",
        baseline=baseline,
        best=prepared,
        trials=(baseline, prepared, larger, failed),
        speedup=prepared.speedup,
        stopped="no strategy is left",
        binding=None,
        command="hasten run trainer.batch_size=128",
        seconds=100.0,
        spent=90.0,
        machine={"processor": "EPYC"},
        tracking_command="mlflow ui",
    )
