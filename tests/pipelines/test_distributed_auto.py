"""`distributed=auto` from the command line: what is weighed, taken and told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hasten import cli
from hasten.core.files import read_json
from hasten.core.preflight import refusals
from hasten.core.recipe import Composer
from hasten.session import Session
from hasten.stages.layout import _ingredients

AUTO = ("distributed=auto", "distributed.devices=2", "distributed.bandwidth_mbit=100000", "dry_run=true")


@pytest.fixture
def made(tiny: tuple[str, ...], hydra: None, tmp_path: Path) -> Any:
    return lambda *overrides: Session.of([*tiny, *AUTO, *overrides], tmp_path)


def test_the_recipe_states_what_was_taken_and_says_what_it_was_taken_from(made: Any) -> None:
    session = made()
    kind = session.recipe.config["distributed"]["kind"]
    assert kind != "auto"
    assert "distributed=auto" not in session.recipe.overrides
    taken = session.layouts.weighed[0]
    assert set(taken.overrides) - {"distributed=single", "distributed.devices=1"} <= set(session.recipe.overrides)
    known = {each.layout: each for each in session.layouts.weighed}
    assert {"single", "ddp", "ddp bfloat16", "fsdp"} <= set(known)
    assert taken.seconds == min(each.seconds for each in known.values() if not each.refused)
    # Batch normalization sees micro-batches alone, and this network has no plan: neither can be taken.
    assert "micro-batch" in known["pipeline 1F1B micro_batches=4"].refused
    assert "model.tensor_plan" in known["tensor"].refused


def test_a_choice_is_kept_for_what_it_was_made_for(tiny: tuple[str, ...], hydra: None) -> None:
    def key(*typed: str) -> str:
        return _ingredients(Composer.of([*tiny, *AUTO, *typed]).compose(), (), SimpleNamespace(fingerprint="rows")).key

    taught = ("student=cifar_resnet", "distillation=features")
    assert key(*taught) == key(*taught)
    assert key(*taught) != key(*taught, "distillation.student_layers=[layer1]")


def test_what_is_typed_is_kept(made: Any) -> None:
    session = made("distributed.shards=2", "distributed.reshard=false")
    section = session.recipe.config["distributed"]
    assert (section["kind"], section["shards"], section["reshard"]) == ("fsdp", 2, False)


def test_a_pipeline_is_held_against_one_that_can_run(tiny: tuple[str, ...], hydra: None, tmp_path: Path) -> None:
    typed = ("objective=training", "distributed=pipeline", "trainer.micro_batches=2", "trainer.compile=none")
    plain = Session.of([*tiny, *typed], tmp_path).untouched
    assert plain.config["trainer"]["micro_batches"] == 2
    assert not refusals(plain)


def test_nothing_is_left_behind_and_the_table_is_shown(
    tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", *AUTO, *tiny]) == 0
    printed = capsys.readouterr().out
    assert "taken" in printed
    assert "MB a process" in printed
    assert "not tensor: " in printed
    assert not list(tmp_path.iterdir())


def test_a_limit_that_nothing_meets_is_told_in_one_line(
    tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", *AUTO, *tiny, "distributed.memory_limit_mb=20"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "distributed=auto finds nothing that fits: the least is" in told[0]
    assert "20 MB is distributed.memory_limit_mb" in told[0]


@pytest.mark.drill
def test_a_run_keeps_its_choice(tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", *AUTO[:-1], *tiny, "distributed.compression=bfloat16"]
    assert cli.run(command) == 0
    (file,) = Path("outputs").rglob("layouts.json")
    chosen = read_json(file)["chosen"]
    assert chosen[0] == "distributed=ddp"
    summary = read_json(file.with_name("summary.json"))
    assert "distributed=ddp" in summary["best"]["rebuild"]
    capsys.readouterr()
    assert cli.run(command) == 0  # the same again, from the store
    assert "ddp bfloat16" in capsys.readouterr().out
