"""What a training that was made faster looks like in a tracking store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hasten.tracking import record


def test_names_say_how_much_faster_it_trains(training_result: Any) -> None:
    names = [record.trial_name(trial) for trial in training_result.trials]
    assert names[0] == "00 baseline"
    assert names[1] == "01 prepare rows default: accepted, 2.0x"
    assert names[3] == "03 compiled step default: failed"
    assert record.result_name("digits", training_result) == "digits: trains 2.0x"


def test_figures_are_those_of_the_training(training_result: Any) -> None:
    figures = record.trial_metrics(training_result.trials[1])
    assert figures["samples_per_second"] == 1820.0
    assert (figures["speedup_plain_low"], figures["speedup_plain_high"]) == (1.9, 2.1)
    assert (figures["loss"], figures["loss_limit"], figures["loss_baseline"]) == (1.82, 1.95, 1.8)
    assert figures["step_data_ms"] == 70.0
    assert figures["memory_bytes"] == 420_000_000
    assert "latency_p50_ms" not in figures


def test_a_failed_trial_has_no_figures_of_a_training(training_result: Any) -> None:
    figures = record.trial_metrics(training_result.trials[3])
    assert "samples_per_second" not in figures


def test_the_parents_curves_follow_the_best_so_far(training_result: Any) -> None:
    _, accepted, rejected, _ = training_result.trials
    points = record.curve_points(rejected, accepted)
    assert points == {"trial_samples_per_second": 2000.0, "best_samples_per_second": 1820.0}


def test_a_run_says_whether_it_found_anything(training_result: Any) -> None:
    assert record.result_verdict(training_result) == "faster"
    assert record.result_verdict(replace(training_result, best=training_result.baseline)) == "not faster"
    figures = record.result_metrics(training_result)
    assert figures["num_trials"] == 4
    assert figures["speedup_plain"] == 2.0


def test_notes_tell_where_the_time_of_a_step_goes(training_result: Any) -> None:
    note = record.trial_note(training_result.baseline)
    assert "Bottleneck from here on: **data**, at 140 ms per training step" in note
    assert "| data | 50% | 70 |" in note
    assert "2.00 times by `loader=default` (trial 1)" in record.result_note(training_result)
