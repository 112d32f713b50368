"""Names and values that MLflow takes, whatever users type."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.credentials import without_credentials
from hasten.core.trial import Certificate, Drop, Interval, Quality, RequestLatency, Result, Trial
from hasten.tracking import record


@given(st.text(max_size=400))
def test_every_key_is_one_that_mlflow_accepts(name: str) -> None:
    key = record.key(name)
    assert re.fullmatch(r"[/\w.\- :]+", key)
    assert 0 < len(key) <= 250
    assert posixpath.normpath(key) == key
    assert not key.startswith(("/", ".."))


@pytest.mark.parametrize("name", ["pruning.sparsity", "val/accuracy", "engine", "a-b_c:d e"])
def test_leaves_ordinary_names_alone(name: str) -> None:
    assert record.key(name) == name


@given(user=st.text("abc/:@", min_size=1).map(lambda text: text.replace("/", "%2F")))
def test_hides_whatever_stands_before_the_host(user: str) -> None:
    assert without_credentials(f"uri=postgresql://{user}@db:5432/runs?x=1") == "uri=postgresql://***@db:5432/runs?x=1"


def test_leaves_urls_without_a_user_alone() -> None:
    text = "see http://server:5000/#/experiments and write to me@example.org"
    assert without_credentials(text) == text


def test_gives_every_metric_under_its_name_and_the_first_as_quality(trials: Sequence[Trial], result: Result) -> None:
    recall = Quality(
        value=0.91,
        drop=Drop(value=0.02, bound=0.05, confidence=0.99, rows=40, label=3),
        max_drop=0.1,
        higher_is_better=True,
    )
    evaluation = trials[1].evaluation
    assert evaluation is not None
    both = replace(evaluation, metrics={**evaluation.metrics, "recall": recall})
    figures = record.trial_metrics(replace(trials[1], evaluation=both))
    assert (figures["quality"], figures["quality_recall"]) == (evaluation.quality, 0.91)
    assert (figures["drop_recall"], figures["drop_bound_recall"]) == (0.02, 0.05)
    certificate = replace(result.certificate, metrics={**result.certificate.metrics, "recall": recall})
    shown = record.result_metrics(replace(result, certificate=certificate))
    assert (shown["test_quality"], shown["test_drop_bound_recall"]) == (0.987, 0.05)


def test_what_nothing_judged_has_no_quality_and_no_figure_that_is_no_number(
    trials: Sequence[Trial], result: Result
) -> None:
    evaluation = trials[1].evaluation
    assert evaluation is not None
    unchecked = replace(trials[1], evaluation=replace(evaluation, quality=None, drop=None, metrics={}))
    assert "quality" not in record.trial_metrics(unchecked)
    assert "trial_quality" not in record.curve_points(unchecked, unchecked)
    ended = replace(result, best=unchecked, certificate=Certificate.unchecked("no labels"))
    shown = record.result_metrics(ended)
    assert not [name for name in shown if name.startswith("test_")]
    assert all(math.isfinite(figure) for figure in shown.values())
    assert record.result_name("digits", ended) == "digits: 1.8x, not certified"


def test_descriptions_say_how_it_was_done_and_what_each_step_gave(trials: Sequence[Trial], result: Result) -> None:
    assert result.best.evaluation is not None
    noted = replace(result.best, evaluation=replace(result.best.evaluation, notes=("layer 1 stays float",)))
    assert "\n- layer 1 stays float\n" in record.trial_note(noted) + "\n"
    told = record.result_note(replace(result, best=noted))
    assert "\n- layer 1 stays float\n" in told
    for step, gain in result.shares:
        assert f"\n- {gain:.2f} times by `{' '.join(step.edit)}` (trial {step.number})\n" in told
    assert result.shares


def test_other_requests_have_metrics_of_their_own(result: Result) -> None:
    one = Interval(value=2.0, low=1.9, high=2.1)
    request = RequestLatency(
        batch_size=32,
        length=16,
        latency_ms={"p50": one, "p90": one, "p99": one},
        throughput=Interval(value=16_000.0, low=15_000.0, high=17_000.0),
        speedup={"eager": one},
        references_ms={"eager": Interval(value=4.0, low=3.8, high=4.2)},
    )
    shown = record.result_metrics(replace(result, requests=(request,)))
    assert (shown["latency_ms_b32_l16"], shown["latency_ms_b32_l16_high"]) == (2.0, 2.1)
    assert (shown["throughput_b32_l16"], shown["speedup_eager_b32_l16_low"]) == (16_000.0, 1.9)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("get http://server/a?token=abc123&page=2", "get http://server/a?token=***&page=2"),
        ("s3://bucket/a?X-Amz-Signature=abc&b=1", "s3://bucket/a?X-Amz-Signature=***&b=1"),
        ("blob?sv=1&sig=a%2Fb&api_key=c", "blob?sv=1&sig=***&api_key=***"),
        ("postgresql://db/x?user=me&password=p", "postgresql://db/x?user=me&password=***"),
        ("Authorization: Bearer abcdefgh.ijk-l", "Authorization: Bearer ***"),
        ("hydra/launcher=basic launcher, a basic assumption", "hydra/launcher=basic launcher, a basic assumption"),
        ("pruning.sparsity=0.5 tokens=128", "pruning.sparsity=0.5 tokens=128"),
    ],
)
def test_hides_what_opens_doors_in_queries_and_headers_and_nothing_else(said: str, kept: str) -> None:
    assert without_credentials(said) == kept


def test_hides_the_secrets_of_the_environment_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "0f9d8c7b")
    assert without_credentials("it answers 401 to 0f9d8c7b") == "it answers 401 to ***"


def test_descriptions_begin_with_the_reason_and_end_with_the_command_line_by_line(
    trials: Sequence[Trial],
) -> None:
    trial = replace(trials[1], rebuild="hasten run pruning=structured 'target.engines=[eager]'")
    note = record.trial_note(trial).split("\n")
    assert note[0] == "**accepted**: 1.8 times as fast, drop at most 0.4 points"
    assert "Bottleneck from here on: **compute**" in note[2]
    assert note[-5:] == ["```", "hasten run \\", "  pruning=structured \\", "  'target.engines=[eager]'", "```"]
