"""Trainings in several processes that are asked for a few steps at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_module

from hasten.core import schema
from hasten.core.errors import EngineError
from hasten.core.interfaces import StepFigures
from hasten.core.interpreter import import_path
from hasten.core.memory import anonymous_bytes
from hasten.core.recipe import Composer, Recipe
from hasten.core.store import Store
from hasten.core.training_objective import TrainingObjective
from hasten.evidence.pace import Trainee, Training
from hasten.stages.training_evaluation import TrainingEvaluator

SMALL = ("model=mlp", "model.arch.hidden=[48]", "trainer.threads=1", "trainer.batch_size=45")
NUM_PARAMETERS = 64 * 48 + 48 + 48 * 10 + 10
SPREAD = ("distributed=ddp", "objective=training")
STEPS = 20
STARTS_AND_WAITS = """
import time
from hasten.core.sections import Distributed
from hasten.stages.companions import companions
with companions("hasten.stages.trainee", Distributed(kind="ddp", devices=2), 1) as others:
    print(others.pids[0], flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TrainingEvaluator:
    return TrainingEvaluator(store=Store(tmp_path_factory.mktemp("store")), objective=TrainingObjective(), seed=3)


def recipe(*typed: str) -> Recipe:
    return Composer.of([*SMALL, *typed]).compose()


def training(bench: TrainingEvaluator, *typed: str) -> Training:
    return bench.training_of(bench.prepared(recipe(*typed)))


@pytest.fixture(scope="module")
def spread(bench: TrainingEvaluator) -> Iterator[tuple[Trainee, Training]]:
    """One training in two processes, asked for losses before it is asked for steps."""
    asked = training(bench, *SPREAD)
    with Trainee.of(asked) as trainee:
        yield trainee, asked


@pytest.mark.slow
def test_losses_are_those_of_one_process(spread: tuple[Trainee, Training], bench: TrainingEvaluator) -> None:
    trainee, asked = spread
    together = trainee.losses({**asked.spec, "steps": STEPS})
    with Trainee.of(training(bench)) as single:
        alone = single.losses({**asked.spec, "steps": STEPS})
    assert together["batch_size"] == alone["batch_size"] == 45
    assert len(together["losses"]) == STEPS
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-4)


@pytest.mark.slow
def test_the_profile_tells_what_the_processes_tell_one_another(spread: tuple[Trainee, Training]) -> None:
    trainee, asked = spread
    found = StepFigures.from_dict(trainee.profile(asked.spec, warm_up=2, steps=2)["figures"])
    reduced = found.collectives[0]
    assert (reduced.kind, reduced.calls, reduced.num_bytes) == ("all_reduce", 1, 4 * NUM_PARAMETERS)
    assert 0 < reduced.waited_ms <= reduced.milliseconds
    assert max(found.waiting_ms, key=lambda phase: found.waiting_ms[phase]) == "backward"
    assert sum(found.waiting_ms.values()) == pytest.approx(sum(each.waited_ms for each in found.collectives))


@pytest.mark.slow
def test_stands_still_between_two_questions(spread: tuple[Trainee, Training]) -> None:
    trainee, asked = spread
    assert trainee.begin(asked.spec)["batch_size"] == 45
    assert len(trainee.steps(4)) == 4
    pids = (trainee.process.pid, *trainee.companions.pids)
    assert len(pids) == 2
    assert trainee.memory_bytes > 1.5 * anonymous_bytes(pids[0])  # that of both
    time.sleep(0.2)
    before = cpu_seconds(*pids)
    time.sleep(1)
    assert cpu_seconds(*pids) - before < 0.2
    assert len(trainee.steps(2)) == 2


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_ends_the_training(bench: TrainingEvaluator) -> None:
    asked = training(bench, *SPREAD)
    with Trainee.of(asked) as trainee:
        trainee.begin(asked.spec)
        os.kill(trainee.companions.pids[0], signal.SIGKILL)
        with pytest.raises(EngineError, match="process 1 of 2 died of signal SIGKILL"):
            trainee.steps(1000)


@pytest.mark.drill
def test_a_training_that_fails_says_why(bench: TrainingEvaluator) -> None:
    asked = training(bench, *SPREAD, "trainer.lr=1e30")
    with Trainee.of(asked) as trainee:
        pids = trainee.companions.pids
        with pytest.raises(EngineError, match="the loss became"):
            trainee.losses({**asked.spec, "steps": STEPS})
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.drill
def test_companions_end_with_what_started_them() -> None:
    environment = {**os.environ, "PYTHONPATH": import_path()}
    command = [sys.executable, "-c", STARTS_AND_WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        companion = Path(f"/proc/{int(parent.stdout.readline())}")
        parent.kill()
    deadline = time.monotonic() + 60
    while companion.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not companion.exists()


def cpu_seconds(*pids: int) -> float:
    """User and system time of processes (proc(5), /proc/pid/stat)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")
