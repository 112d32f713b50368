"""`summary.json` and the sentences that all reports share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.core.files import read_json, write_json
from hasten.core.trial import Result
from hasten.reporting import summary

MakeResult = Callable[..., Result]


def test_holds_the_whole_result(result: Result) -> None:
    found = summary.to_json(result)
    assert found["experiment"] == "digits"
    assert set(found["speedup"]) == {"eager", "engine", "previous"}
    assert found["speedup"]["eager"] == pytest.approx({"value": 42.1, "low": 42.1 * 0.97, "high": 42.1 * 1.03})
    assert found["size_ratio"] == 37.2
    assert {"held", "metric", "margin", "bound", "confidence", "rows", "reads"} <= set(found["certificate"])
    assert found["overrides"] == list(result.best.overrides)
    assert found["front"] == [0, 1, 3, 7, 8]
    assert found["stopped"] == "no strategy is left"
    assert found["seconds"] == 612.0
    assert found["baseline"]["number"] == 0
    assert found["best"]["number"] == 8
    assert [trial["number"] for trial in found["trials"]] == list(range(12))
    assert [(share["trial"], share["tried"]) for share in found["shares"]][:2] == [
        (1, "engine=onnxruntime"),
        (3, "pruning.sparsity=0.5"),
    ]


def test_a_trial_says_what_was_tried_why_and_what_came_of_it(result: Result) -> None:
    trial = summary.to_json(result)["trials"][6]
    assert trial["strategy"] == "static_int8"
    assert trial["verdict"] == "rejected"
    assert trial["reason"].startswith("compressed but not faster")
    assert trial["expected_gain"] == 2.0
    assert trial["measured_gain"] == pytest.approx(0.452 / 0.461)
    assert trial["evaluation"]["latency_ms"]["p50"]["value"] == 0.461
    assert trial["evaluation"]["drop"]["rows"] == 450


def test_survives_strict_json_with_null_for_what_is_not_finite(made_up: MakeResult, tmp_path: Path) -> None:
    odd = made_up(size_ratio=math.inf, machine={"load": math.nan, "isa": ("avx2",)})
    found = summary.to_json(odd)
    assert found["size_ratio"] is None
    assert found["machine"] == {"load": None, "isa": ["avx2"]}
    json.dumps(found, allow_nan=False)
    write_json(tmp_path / "summary.json", found)
    assert read_json(tmp_path / "summary.json") == found


def test_every_trial_carries_its_command(result: Result) -> None:
    found = summary.to_json(result)
    assert [trial["rebuild"] for trial in found["trials"]] == [trial.rebuild for trial in result.trials]
    assert found["rebuild"] == result.best.rebuild


def test_names_what_was_tried_without_the_group_whose_knob_follows(result: Result) -> None:
    assert [summary.tried(result.trials[number]) for number in (0, 1, 3, 8)] == [
        "baseline",
        "engine=onnxruntime",
        "pruning.sparsity=0.5",
        "student=resnet distillation=soft_labels",
    ]


def test_a_trial_addresses_the_bottleneck_of_the_recipe_it_edited(result: Result) -> None:
    trials = {trial.number: trial for trial in result.trials}
    assert summary.addressed(trials[1], trials) == "compute"
    assert summary.addressed(trials[8], trials) == "overhead"


def test_claims_what_was_measured_and_certified(result: Result) -> None:
    assert summary.claim(result) == (
        "digits runs 42.1 times as fast as in eager PyTorch (between 40.8 and 43.4), is 37.2 times smaller, "
        "and its accuracy is certified to drop by at most 1.49 points."
    )


def test_claims_no_quality_that_is_not_certified(result: Result) -> None:
    uncertified = replace(result, certificate=replace(result.certificate, held=False))
    assert "it is not certified that its accuracy holds" in summary.claim(uncertified)
    assert "at most" not in summary.claim(uncertified)


def test_claims_no_drop_where_none_is_possible(result: Result) -> None:
    [(name, judged)] = result.certificate.metrics.items()
    assert judged.drop is not None
    gained = replace(judged, drop=replace(judged.drop, bound=-0.001))
    better = replace(result, certificate=replace(result.certificate, metrics={name: gained}))
    assert "certified not to drop" in summary.claim(better)


def test_says_that_a_larger_artefact_is_larger(made_up: MakeResult) -> None:
    assert "is 2.00 times larger" in summary.claim(made_up(size_ratio=0.5))


def test_claims_nothing_where_nothing_was_accepted(result: Result) -> None:
    unchanged = replace(result, best=result.baseline)
    assert summary.claim(unchanged) == "Nothing that was tried makes digits surely faster inside its constraints."


def test_claims_every_certified_metric_in_its_unit(forecast: Result) -> None:
    assert summary.claim(forecast).endswith(
        "and its squared_error is certified to rise by at most 1.11 % of the baseline "
        "and its psnr is certified to drop by at most 0.75."
    )


def test_claims_no_quality_where_nothing_has_checked_it(unchecked: Result) -> None:
    assert summary.claim(unchecked).endswith("is 37.2 times smaller, and nothing has checked its quality.")
    found = summary.to_json(unchecked)
    assert found["certificate"]["bound"] is None
    assert found["best"]["evaluation"]["quality"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("optimize", "claimed", "nothing"),
    [
        ("size", "digits is 37.2 times smaller, runs 42.1 times as fast", "makes digits smaller"),
        ("throughput", "digits serves 42.1 times as many rows per second as", "surely serve more rows per second"),
        ("memory", "takes 212 MB of memory instead of 212 MB", "surely smaller in memory"),
    ],
)
def test_claims_what_was_optimised(made_up: MakeResult, optimize: str, claimed: str, nothing: str) -> None:
    result = made_up(optimize=optimize)
    assert summary.to_json(result)["optimize"] == optimize
    assert claimed in summary.claim(result)
    assert nothing in summary.claim(replace(result, best=result.baseline))
