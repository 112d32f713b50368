"""How fast trainings are, in turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hasten.core.errors import EngineError
from hasten.evidence.latency import CANDIDATE
from hasten.evidence.pace import Pace, PaceProtocol, Trainee, Training, measure, samples_per_second, speedups, step_ms

BRIEFLY = PaceProtocol(block_seconds=0.01, min_rounds=4, max_rounds=6, pause_seconds=0.0, launch_sd=0.0)

TRAINING = """
import json, sys, time
spec = None
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "begin":
        spec = asked["spec"]
        answer = {"result": {"batch_size": spec["batch_size"], "notes": ["made up"]}}
        if spec.get("fails"):
            answer = {"error": "PassError: the loss became nan", "trace": ""}
    elif asked["do"] == "steps":
        with open(spec["log"], "a") as log:
            log.write(f"{spec['name']} {asked['number']}\\n")
        answer = {"result": [spec["ms"]] * asked["number"]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A training that takes no time and says that each step took as long as it was told."""
    (tmp_path / "made_up_training.py").write_text(TRAINING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "made_up_training"


def spec(tmp_path: Path, name: str, ms: float, batch_size: int = 10, **more: object) -> dict[str, object]:
    return {"name": name, "ms": ms, "batch_size": batch_size, "log": str(tmp_path / "log"), **more}


def measured(module: str, specs: dict[str, dict[str, object]], settle: int = 0) -> Pace:
    trainings = {name: Training(module, each, threads=1, settle=settle) for name, each in specs.items()}
    return measure(trainings, BRIEFLY, seed=0)


def test_rows_per_second_count_the_rows_of_a_step(module: str, tmp_path: Path) -> None:
    specs = {CANDIDATE: spec(tmp_path, "a", 2.0, batch_size=20), "plain": spec(tmp_path, "b", 4.0, batch_size=10)}
    pace = measured(module, specs)
    assert samples_per_second(pace, 0.95).value == pytest.approx(10_000)  # 20 rows in 2 ms
    assert samples_per_second(pace, 0.95, "plain").value == pytest.approx(2_500)
    assert speedups(pace, 0.95)["plain"].value == pytest.approx(4.0)
    assert step_ms(pace, 0.95).value == pytest.approx(2.0)
    assert pace.notes[CANDIDATE] == ("made up",)
    assert pace.start_seconds[CANDIDATE] > 0


def test_participants_have_their_turns_in_every_round(module: str, tmp_path: Path) -> None:
    names = {CANDIDATE: "a", "plain": "b", "previous": "c"}
    pace = measured(module, {key: spec(tmp_path, name, 5.0) for key, name in names.items()})
    turns = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()][len(names) :]
    rounds = [sorted(turns[place : place + 3]) for place in range(0, len(turns), 3)]
    assert rounds == [["a", "b", "c"]] * len(pace.blocks_ms[CANDIDATE])


def test_steps_that_a_loader_had_ready_are_not_counted(module: str, tmp_path: Path) -> None:
    pace = measured(module, {CANDIDATE: spec(tmp_path, "a", 5.0)}, settle=3)
    warm_up, *blocks = (int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines())
    assert warm_up == BRIEFLY.warm_up_steps
    assert blocks[0] == BRIEFLY.min_steps + 3
    assert len(pace.blocks_ms[CANDIDATE][0]) == BRIEFLY.min_steps


def test_a_measurement_survives_as_json_and_gives_its_pairs(module: str, tmp_path: Path) -> None:
    pace = measured(module, {CANDIDATE: spec(tmp_path, "a", 2.0), "key": spec(tmp_path, "b", 3.0)})
    assert Pace.from_dict(pace.to_dict()) == pace
    pair = pace.pair("key", "reference")
    assert speedups(pair, 0.95)["reference"].value == pytest.approx(1.5)
    assert set(pace.pair(None, "").blocks_ms) == {CANDIDATE}


def test_a_training_that_fails_says_why(module: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the loss became nan"):
        measured(module, {CANDIDATE: spec(tmp_path, "a", 2.0, fails=True)})


def test_a_process_that_dies_is_told(module: str, tmp_path: Path) -> None:
    with Trainee(module, 1) as trainee, pytest.raises(EngineError, match="exit code 1"):
        trainee.losses({})
