"""The data stage: a source of several columns, transformed and divided, with what the deployed model has to know."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hasten.core.errors import ConfigError
from hasten.core.files import read_json
from hasten.core.interfaces import Columns, DataSource, Input, Table
from hasten.core.recipe import Composer, Recipe
from hasten.core.sections import Metric
from hasten.data.prepare import read
from hasten.stages import data
from hasten.stages.stage import Tools
from hasten.tasks.regression import Regression

pytestmark = pytest.mark.usefixtures("hydra")

NUM_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Reviews(DataSource):
    """Texts, pictures and numbers, some of which could not be read."""

    def fingerprint(self) -> str:
        return "reviews"

    def load(self) -> Table:
        columns: Columns = {
            "text": np.array([f"word{row} and more" for row in range(NUM_ROWS)], dtype=object),
            "picture": np.array([bytes([row]) for row in range(NUM_ROWS)], dtype=object),
            "size": np.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2),
        }
        notes = ("2 rows had no text and were left out.",)
        return Table(inputs=columns, targets=np.arange(NUM_ROWS) % 2, notes=notes)


def recipe(*overrides: str) -> Recipe:
    return Composer.of([f"data._target_={__name__}.Reviews", *overrides]).compose()


def prepared(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    data.Data().make(recipe(*overrides), {}, folder, Tools())
    return folder


SELECT = "data.transforms=[{_target_: hasten.data.transforms.Select, columns: [size]}]"
TOKENS = (
    "data.transforms=[{_target_: hasten.data.transforms.Tokens, column: text, length: 4},"
    "{_target_: hasten.data.transforms.Select, columns: [mask, ids, size]}]"
)


def test_keeps_what_raw_rows_look_like_and_not_only_what_models_take(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "data", SELECT)
    columns = read_json(folder / "columns.json")
    assert list(columns.items()) == [("text", "text"), ("picture", "bytes"), ("size", [2])]
    assert read(folder).inputs == (Input(name="size", shape=(2,)),)


def test_transforms_of_the_config_make_the_inputs(tmp_path: Path) -> None:
    found = read(prepared(tmp_path / "data", TOKENS))
    assert [(each.name, each.dtype) for each in found.inputs] == [
        ("mask", "int64"),
        ("ids", "int64"),
        ("size", "float32"),
    ]
    assert found.facts["vocabulary_size"] > 2
    assert [node["_target_"].rpartition(".")[2] for node in found.transforms] == ["Tokens", "Select", "Standardize"]


def test_what_the_source_has_to_say_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        folder = prepared(tmp_path / "data", SELECT)
    assert "2 rows had no text and were left out." in caplog.messages
    assert read(folder).notes == ("2 rows had no text and were left out.",)


def test_the_task_says_what_targets_are(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "data", SELECT, "task=regression")
    found = read(folder)
    assert (found.output_shape, found.class_counts) == ((1,), None)
    assert found.rows("train").targets.dtype == np.float32
    assert data.task(recipe("task=regression", "task.criterion=huber")) == Regression(criterion="huber")


def test_metrics_come_in_their_order_with_the_objectives_margin() -> None:
    first, second = data.metrics(recipe("objective.max_drop=0.07", "task.metrics.recall.max_drop=0.2"))
    assert first == Metric(name="accuracy", target="hasten.evidence.metrics.accuracy", max_drop=0.07)
    assert (second.name, second.by_class, second.max_drop) == ("recall", True, 0.2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "data.transforms=[{_target_: pathlib.Path}]",
            r"^data\.transforms\[0\]\._target_=pathlib\.Path is no Transform$",
        ),
        ("task._target_=pathlib.Path", r"^task\._target_=pathlib\.Path is no Task$"),
        ("data._target_=pathlib.Path", r"^data\._target_=pathlib\.Path is no DataSource$"),
    ],
)
def test_what_is_no_part_of_its_kind_is_refused_by_its_key(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepared(tmp_path / "data", override)


def test_a_column_that_no_transform_takes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data: the column text holds texts or bytes, .*data\.transforms, or"):
        prepared(tmp_path / "data")
