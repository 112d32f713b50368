"""What a sweep reports: the front, nothing that was not measured, and no text that breaks the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from hasten.core.trial import Result, TrainingResult, Trial
from hasten.reporting.facts import finite, restored
from hasten.reporting.sweep import Job, Sweep, claim, report, to_json
from hasten.reporting.terminal import Screen


@pytest.fixture
def sweep(result: Result) -> Sweep:
    """Every trial of the made-up run but its baseline as a job of a sweep."""
    jobs = tuple(
        Job(
            number=trial.number,
            choices=dict(text.partition("=")[::2] for text in (*trial.overrides, f"seed={trial.number % 3}")),
            folder=f"job-{trial.number}",
            verdict=trial.verdict,
            reason=trial.reason,
            seconds=10.0,
            trial=trial if trial.verdict != "failed" else None,
            rebuild=f"hasten run {' '.join(trial.overrides)}",
        )
        for trial in result.trials[1:]
    )
    return Sweep(
        name="digits-01234567",
        experiment="digits",
        command="hasten -m run seed=0,1,2",
        optimize="p50",
        jobs=jobs,
        total=12,
        untouched=result.baseline,
    )


def test_the_front_is_what_no_other_beats_in_both(sweep: Sweep) -> None:
    places = {
        job.number: (job.trial.evaluation.latency_ms["p50"].value, job.trial.evaluation.quality)
        for job in sweep.jobs
        if job.trial is not None and job.trial.evaluation is not None and job.trial.evaluation.quality is not None
    }
    for number, (latency, accuracy) in places.items():
        beaten = any(
            other <= latency and better >= accuracy and (other, better) != (latency, accuracy)
            for other, better in places.values()
        )
        assert (number in sweep.front) != beaten


def test_the_best_is_the_fastest_that_was_accepted(sweep: Sweep) -> None:
    assert sweep.chosen is not None
    assert (sweep.chosen.number, sweep.best.number) == (8, 8)
    assert "job 8 is the best of 11, latency p50 74.1 µs and accuracy 97.8 %" in claim(sweep)


def test_sweep_json_is_strict_and_gives_every_job_back(sweep: Sweep) -> None:
    plain = json.loads(json.dumps(to_json(sweep), allow_nan=False))
    assert plain["best"] == 8
    assert plain["front"] == list(sweep.front)
    assert [job["number"] for job in plain["jobs"] if job["on_front"]] == plain["front"]
    assert plain["failed"] == [9]
    assert all(job["rebuild"].startswith("hasten run ") for job in plain["jobs"])


def test_trials_come_back_from_json_as_they_were(result: Result, training_result: TrainingResult) -> None:
    for trial in (*result.trials, *training_result.trials):
        assert restored(Trial, json.loads(json.dumps(finite(trial.to_dict())))) == trial


class Balance(HTMLParser):
    """Tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_shows_every_job(sweep: Sweep) -> None:
    bad = replace(sweep.jobs[0], reason="<script>alert(1)</script>", choices={"model.<b>": "'\"><i>"})
    page = report(replace(sweep, jobs=(bad, *sweep.jobs[1:])))
    assert "<script>alert" not in page
    assert "<i>" not in page
    assert not re.search(r'(src|href)="(?!#|data:|job-)', page)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert all(f'data-number="{job.number}"' in page for job in sweep.jobs)
    lines = re.findall(r'<path d="[^"]*" class="(\w+)( front)?" data-number="(\d+)"', page)
    assert len(lines) == len(sweep.measured)
    assert {int(number) for _, front, number in lines if front} == set(sweep.front)


def test_better_is_higher_up_on_the_axes_of_results(sweep: Sweep) -> None:
    page = report(sweep)
    found = re.findall(r'data-number="(\d+)" data-heights="([^"]*)"', page)
    heights = {int(number): [float(each) if each else None for each in text.split(",")] for number, text in found}
    places = {job.number: job for job in sweep.measured}
    latencies = {number: sweep.cost(job) for number, job in places.items()}
    titles = re.findall(r'class="title"[^>]*>([^<]*)<', page)
    axis = titles.index("latency p50")
    ranked = sorted(heights, key=lambda number: heights[number][axis] or 0.0)
    assert ranked == sorted(latencies, key=lambda number: latencies[number])


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_cuts_no_figure(sweep: Sweep, width: int) -> None:
    written = StringIO()
    Screen(Console(file=written, width=width, color_system=None)).sweep(sweep)
    lines = written.getvalue().splitlines()
    (best,) = [place for place, line in enumerate(lines) if re.match(r" *8 ", line)]
    assert "74.1 [71.9, 76.3] µs" in lines[best]
    assert "118 kB" in lines[best]
    assert "accepted *" in lines[best]
    assert "soft_labels" in lines[best if width == 200 else best + 1]
    assert any(line.startswith("  9 ") and "ask for target.threads=2" in line for line in lines)


def test_trainings_are_ranked_by_their_pace(training_result: TrainingResult) -> None:
    jobs = tuple(
        Job(
            number=trial.number,
            choices={"loader": "plain" if trial.number == 2 else "default"},
            folder=str(trial.number),
            verdict=trial.verdict,
            reason=trial.reason,
            seconds=1.0,
            trial=trial if trial.training is not None else None,
            rebuild=trial.rebuild,
        )
        for trial in training_result.trials[1:]
    )
    sweep = Sweep(
        name="digits-0",
        experiment="digits",
        command="hasten -m run",
        optimize="p50",
        jobs=jobs,
        untouched=training_result.baseline,
    )
    assert [job.number for job in sweep.ranked] == [2, 1, 3]
    assert sweep.chosen is not None
    assert sweep.chosen.number == 1
    assert "1.82 k rows/s; it trains 2.00 times as fast as a plain script" in claim(sweep)
    assert "rows/s" in report(sweep)
