"""What a run that makes training faster shows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from hasten.core.trial import Interval
from hasten.reporting.terminal import Screen
from hasten.reporting.training import claim, facts, phases_told, report, to_json


def test_claims_the_ratio_with_its_interval_and_equal_loss(training_result: Any) -> None:
    assert claim(training_result) == (
        "digits trains 2.00 times as many rows per second as its plain script (between 1.90 and 2.10), at a loss "
        "within the spread of the script's seeds."
    )


def test_claims_nothing_where_nothing_was_accepted(training_result: Any) -> None:
    nothing = replace(training_result, best=training_result.baseline)
    assert claim(nothing).startswith("Nothing that was tried surely makes the training of digits faster")
    alone = replace(nothing, trials=(training_result.baseline,), stopped="interrupted")
    assert claim(alone) == "digits was interrupted before anything was tried."


def test_facts_name_the_loss_and_why_it_stopped(training_result: Any) -> None:
    told = dict(facts(training_result))
    assert told["rows per second"] == "910 -> 1.82 k"
    assert told["loss"].startswith("within the seeds' spread")
    assert told["stopped"] == "no strategy is left"


def test_the_page_shows_every_trial_and_escapes_what_they_say(training_result: Any) -> None:
    page = report(training_result)
    for text in ("no &lt;compiler&gt;", "are &lt;kept&gt; in memory", "loader=default", "trainer.batch_factor=4"):
        assert text in page
    assert "no <compiler>" not in page
    assert page.count("<svg") == 3  # paces, phases, losses
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_page_without_losses_and_profiles_is_whole(training_result: Any) -> None:
    bare = replace(training_result.baseline, step_profile=None)
    page = report(replace(training_result, baseline=bare, best=bare, trials=(bare,)))
    assert page.count("<svg") == 1
    assert "Nothing that was tried" in page


def test_phases_that_take_no_time_are_left_out(training_result: Any) -> None:
    told = phases_told(training_result.baseline.step_profile)
    assert told == "data 50%, forward 18%, backward 29%, optimizer 3%, other 1%"


def test_the_summary_is_strict_json(training_result: Any) -> None:
    unknown = Interval(value=float("nan"), low=0.0, high=float("inf"))
    summary = to_json(replace(training_result, speedup={"plain": unknown}))
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text)["speedup"]["plain"] == {"value": None, "low": 0.0, "high": None}
    assert summary["shares"] == [{"trial": 1, "tried": "loader=default", "gain": pytest.approx(2.0)}]


def test_the_terminal_shows_rows_per_second_and_the_commands(training_result: Any) -> None:
    console = Console(file=io.StringIO(), width=80)
    screen = Screen(console)
    for trial in training_result.trials:
        screen.trial(trial)
    with screen:
        pass
    screen.step_profile(training_result.baseline.step_profile, "plain")
    screen.summary(training_result)
    shown = console.file.getvalue()
    for text in ("1.82 k [1.77 k, 1.89 k] rows/s", "vs plain", "run        hasten run trainer.batch_size=128"):
        assert text in shown
    assert "bottleneck: data (data 50%, compute 30%, memory 10%, overhead 10%)" in shown
    assert max(len(line) for line in shown.splitlines() if "rows/s" in line and "trial" not in line) <= 80
