"""Two runs side by side, and results that come back from their JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hasten.core import restore
from hasten.core.errors import HastenError
from hasten.core.trial import Interval, Result
from hasten.reporting import summary, training
from hasten.reporting.comparison import Pairing, Side, compared, differences, figures


@pytest.mark.parametrize("name", ["result", "unchecked", "forecast", "served"])
def test_a_result_comes_back_from_its_json_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(name)
    again = restore.result(json.loads(json.dumps(summary.to_json(result))))
    assert summary.to_json(again) == summary.to_json(result)


def test_so_does_one_of_a_training(training_result: Any) -> None:
    again = restore.result(json.loads(json.dumps(training.to_json(training_result))))
    assert again == training_result


def test_what_is_no_whole_result_is_told_so() -> None:
    with pytest.raises(HastenError, match=r"this is no whole Trial: .*number"):
        restore.trial({"verdict": "accepted"})


def test_shows_what_was_chosen_otherwise_and_nothing_else(result: Result) -> None:
    first = replace(result.best, overrides=("pruning.sparsity=0.5",), choices={"engine": "eager", "pruning": "none"})
    second = replace(first, overrides=("seed=1",), choices={"engine": "onnxruntime", "pruning": "none"})
    assert [tuple(line) for line in differences(first, second)] == [
        ("engine", "eager", "onnxruntime"),
        ("pruning.sparsity", "0.5", "–"),
        ("seed", "–", "1"),
    ]
    assert differences(first, first) == []


def test_lays_every_figure_of_one_beside_that_of_the_other(result: Result, training_result: Any) -> None:
    lines = {line.name: (line.first, line.second) for line in figures(result.baseline, result.best)}
    assert {"latency p50", "latency p99", "rows per second", "vs eager", "size", "memory", "verdict"} <= lines.keys()
    assert lines["vs eager"][0] == "–"
    assert "[" in lines["latency p50"][0]
    assert "[" in lines["latency p50"][1]
    trained = {line.name for line in figures(*training_result.trials[:2])}
    assert {"rows per second", "step", "vs plain", "loss"} <= trained


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (1.1, 1.4, "The second is surely faster: 1.20x [1.10, 1.40]."),
        (0.7, 0.9, "The second is surely slower: 1.20x [0.70, 0.90]."),
        (0.9, 1.4, "No difference in speed can be told: 1.20x [0.90, 1.40]."),
    ],
)
def test_claims_no_more_than_the_interval_says(low: float, high: float, told: str) -> None:
    assert Pairing(ratio=Interval(value=1.2, low=low, high=high), how="").verdict == told


def test_the_page_holds_both_and_escapes_what_they_say(result: Result) -> None:
    first = Side(name="<b>one</b>", where="abc", trial=result.baseline, machine={"processor": "made <up>"})
    second = Side(name="two", where="def", trial=result.best, machine={"processor": "another"})
    page = compared(first, second, Pairing(ratio=None, how="different machines"))
    assert "Which of the two is faster can&#39;t be told." in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    assert "made &lt;up&gt;" in page
    assert "<b>one" not in page
    assert result.best.rebuild.split()[0] in page
    assert page.count("<svg") == 1
