"""`hasten objective=training`: the same loop makes training itself faster."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest

from hasten.core.trial import PHASES
from hasten.evidence.pace import PaceProtocol
from hasten.session import Session

BRIEFLY = PaceProtocol(
    block_seconds=0.02, warm_up_steps=2, pause_seconds=0.0, min_rounds=3, max_rounds=3, precision=0.5
)
LOOP = (
    "optimize",
    "objective=training",
    "objective.loss_steps=20",
    "objective.loss_seeds=2",
    "objective.candidate_seeds=1",
    "strategy=[prepare_rows,optimizer_kernels]",
    "planner.max_trials=2",
)


@pytest.fixture(scope="module", autouse=True)
def _briefly() -> Iterator[None]:
    """A few steps tell as much of the loop as many."""
    measured = Session.training_bench.func  # type: ignore[attr-defined]
    bench = cached_property(lambda session: replace(measured(session), protocol=BRIEFLY))
    bench.__set_name__(Session, "training_bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "training_bench", bench)
        yield


@pytest.fixture(scope="module")
def optimised(hasten: Any) -> Any:
    return hasten(*LOOP)


@pytest.mark.slow
def test_starts_from_a_plain_script_and_judges_rows_per_second_at_equal_loss(optimised: Any) -> None:
    assert optimised.code == 0, optimised.told
    summary = optimised.summary
    assert summary["optimize"] == "training"
    baseline, *tried = summary["trials"]
    assert "loader=plain" in baseline["overrides"]
    assert "trainer.optimizer_kernels=for_loop" in baseline["overrides"]
    assert baseline["training"]["loss"] is None
    assert len(tried) == 2
    for trial in tried:
        assert trial["verdict"] in ("accepted", "rejected"), trial["reason"]
        ratio = trial["training"]["speedup"]["previous"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        if trial["verdict"] == "accepted":
            assert trial["training"]["loss"]["holds"]
            assert ratio["low"] > 1
        assert "objective=training" in trial["rebuild"]


@pytest.mark.slow
def test_accepted_trials_are_profiled_by_the_phases_of_a_step(optimised: Any) -> None:
    profile = optimised.summary["baseline"]["step_profile"]
    assert set(profile["phases_ms"]) == set(PHASES)
    assert sum(profile["phases_ms"].values()) == pytest.approx(profile["step_ms"])
    assert sum(share for name, share in profile["shares"].items() if name != "capacity") == pytest.approx(1)
    assert profile["bottleneck"] in profile["shares"]


@pytest.mark.slow
def test_leaves_a_report_and_the_commands_to_go_on_with(optimised: Any) -> None:
    page = (optimised.folder / "report.html").read_text()
    assert "rows per second" in page
    assert "What each step gave" in page or "Nothing that was tried" in page
    command = optimised.summary["command"]
    assert command.startswith("hasten run ")
    assert "objective=training" not in command
    assert command in optimised.printed
    assert not (optimised.folder / "model").exists()


@pytest.mark.slow
def test_starting_again_measures_nothing_twice_and_decides_alike(optimised: Any, hasten: Any) -> None:
    again = hasten(*LOOP)
    measured = [
        [(trial["overrides"], trial["verdict"], trial["reason"], trial["seconds"]) for trial in run.summary["trials"]]
        for run in (optimised, again)
    ]
    assert measured[0] == measured[1]
    assert sum(trial["spent"] for trial in again.summary["trials"]) < optimised.summary["spent"] / 2


@pytest.mark.slow
def test_a_training_that_fails_ends_its_trial_alone(hasten: Any) -> None:
    done = hasten("run", "objective=training", "objective.loss_steps=20", "objective.loss_seeds=2", "trainer.lr=1e30")
    # The baseline fails as well here: there is nothing to compare with, and the run says so.
    assert done.code == 1
    assert "the loss became" in done.told


@pytest.mark.slow
def test_profile_tells_where_a_steps_time_goes(hasten: Any) -> None:
    done = hasten("profile", "objective=training")
    assert done.code == 0, done.told
    assert "per training step" in done.printed
    profile = json.loads((done.folder / "profile.json").read_text())
    assert math.fsum(profile["phases_ms"].values()) == pytest.approx(profile["step_ms"])


def test_a_dry_run_tells_what_would_be_measured(hasten: Any) -> None:
    done = hasten(*LOOP, "dry_run=true", "seed=3")
    assert done.code == 0
    assert "losses" in done.printed
    assert "compile" not in done.printed.split("trainer.optimizer_kernels")[0]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("model.training.epochs=0", "model.training.epochs=0 leaves the model untrained"),
        ("objective.max_latency_ms=3", "objective=training measures no requests, and can't hold"),
        ("objective.loss_seeds=1", "loss_seeds must be an integer of at least 2, got 1 (objective.loss_seeds)"),
        ("objective.lossseeds=3", "objective.lossseeds is no key of the config, did you mean 'objective.loss_seeds'?"),
        ("loader.cache=disc", "cache must be one of auto, memory, disk, none, got 'disc' (loader.cache)"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(hasten: Any, wrong: str, told: str) -> None:
    done = hasten("objective=training", wrong)
    assert done.code == 2
    assert told in done.told
    assert not done.folder.exists()
