"""What a person sees, as plain text of a terminal of a given width."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hasten.core.interfaces import Progress
from hasten.core.store import Listing
from hasten.core.trial import Result
from hasten.reporting.terminal import Finding, Screen

WIDTHS = pytest.mark.parametrize("width", [80, 100, 120, 160])


def make_console(width: int, terminal: bool = False, height: int = 24) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, width=width, height=height, force_terminal=terminal, color_system=None, highlight=False, _environ={}
    )
    return console, file


def show_trials(result: Result, width: int) -> str:
    console, file = make_console(width)
    with Screen(console) as screen:
        for trial in result.trials:
            screen.trial(trial)
    return file.getvalue()


def table_of(text: str) -> list[str]:
    """The lines from the table's head on."""
    lines = text.splitlines()
    return lines[next(index for index, line in enumerate(lines) if "latency p50" in line) :]


@WIDTHS
def test_no_figure_of_the_table_is_cut(result: Result, width: int) -> None:
    lines = table_of(show_trials(result, width))
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    figures = ("3.12 [3.03, 3.21] ms", "74.1 [71.9, 76.3] µs", "42.1x", "0.96x", "85.09", "4.39 MB", "98.4 %")
    assert [figure for figure in figures if figure not in text] == []
    assert "…" not in text


@WIDTHS
def test_the_table_gives_every_trial_with_its_reason(result: Result, width: int) -> None:
    flat = " ".join(" ".join(table_of(show_trials(result, width))).split())
    missing = [trial.number for trial in result.trials if f": {trial.reason}" not in flat]
    assert missing == []


def test_a_log_gets_one_line_a_trial_as_it_ends(result: Result) -> None:
    console, file = make_console(80)
    with Screen(console) as screen:
        screen.trial(result.trials[3])
        [line] = file.getvalue().splitlines()
    assert line.startswith("trial 03 pruning.sparsity=0.5: accepted, bottleneck ")
    assert (
        "p50 452 [438, 466] µs, 6.90x vs eager, 2.90x vs best, accuracy 98.2 % (drop <= 1.32 points), 1.14 MB" in line
    )
    assert line.endswith(result.trials[3].reason)


def test_a_failed_trial_has_a_line_too(result: Result) -> None:
    line = f"trial 09 engine.threads=2: failed, bottleneck overhead; {result.trials[9].reason}"
    assert line in show_trials(result, 80).splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_commands_stand_whole_on_one_line(result: Result, width: int) -> None:
    console, file = make_console(width)
    Screen(console).summary(result)
    lines = [line.partition("   ")[2].strip() for line in file.getvalue().splitlines()]
    assert result.best.rebuild in lines
    assert result.tracking_command in lines
    assert result.model_folder in lines


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_states_ratios_bound_and_certificate(result: Result, width: int) -> None:
    console, file = make_console(width)
    Screen(console).summary(result)
    flat = " ".join(file.getvalue().replace("│", " ").split())
    for claim in (
        "vs eager PyTorch 42.1x [40.8, 43.4]",
        "vs untouched, onnxruntime 17.7x [17.2, 18.2]",
        "size 4.39 MB -> 118 kB",
        "accuracy (test) 98.5 % -> 98.0 %, drop at most 1.49 points, allowed 2.00 points",
        result.certificate.statement,
        f"warning: {result.warnings[0]}",
    ):
        assert claim in flat


def test_every_trial_says_how_it_was_done(result: Result) -> None:
    lines = [line.strip() for line in table_of(show_trials(result, 120))]
    noted = [trial for trial in result.trials if trial.evaluation is not None and trial.evaluation.notes]
    assert lines.count("note: the first and the last layer <stay> float") == len(noted) > 1


def test_the_summary_tells_what_each_step_gave_where_there_was_more_than_one(result: Result) -> None:
    console, file = make_console(160)
    Screen(console).summary(result)
    flat = " ".join(file.getvalue().replace("│", " ").split())
    # 3.12 / 1.31, 1.31 / 0.452, 0.452 / 0.247, 0.247 / 0.0741
    assert (
        "step by step engine=onnxruntime 2.38x, then pruning.sparsity=0.5 2.90x, then engine=openvino 1.83x, then "
        "student=resnet distillation=soft_labels 3.33x" in flat
    )
    console, file = make_console(160)
    Screen(console).summary(replace(result, best=result.trials[1]))
    assert "step by step" not in file.getvalue()


def test_square_brackets_are_no_markup(result: Result) -> None:
    odd = replace(result.trials[1], reason="strategy=[bold] was refused [/red]")
    console, file = make_console(120)
    with Screen(console) as screen:
        screen.trial(odd)
    assert file.getvalue().count("strategy=[bold] was refused [/red]") == 2


def test_a_terminal_shows_progress_while_it_lasts_and_the_table_at_the_end(result: Result) -> None:
    console, file = make_console(100, terminal=True)
    with Screen(console) as screen:
        screen.trial(result.trials[0])
        screen.start("training teacher", total=4)
        screen.advance(4)
        during = file.getvalue()
        screen.stop()
    assert "training teacher" in during
    end = file.getvalue()[len(during) :]
    assert end.rstrip().endswith(result.trials[0].reason)
    assert "trial 00" not in file.getvalue()


def test_a_low_window_shows_the_latest_trials(result: Result) -> None:
    console, file = make_console(100, terminal=True, height=12)
    with Screen(console) as screen:
        for trial in result.trials:
            file.seek(0)
            file.truncate()
            screen.trial(trial)
        drawn = file.getvalue()
    assert "student.width=12" in drawn
    assert "engine=onnxruntime" not in drawn


def test_stopping_what_was_never_started_is_no_error() -> None:
    screen: Progress = Screen(make_console(80)[0])
    screen.advance()
    screen.stop()


def test_no_color_means_no_escape_codes(
    result: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    Screen().summary(result)
    assert "\x1b" not in capsys.readouterr().out


def test_a_terminal_without_unicode_is_no_reason_to_fail(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    screen = Screen()
    with screen:
        screen.trial(result.trials[3])
    assert b"452 [438, 466] ?s" in raw.getvalue()


def test_the_estimate_sums_up(result: Result) -> None:
    console, file = make_console(80)
    Screen(console).estimate([("structured_pruning", 4, 120.0), ("engine", 2, 20.0)], 412.0)
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ["structured_pruning", "4", "2", "min", "00", "s"] in lines
    assert lines[-1][-4:] == ["6", "min", "52", "s"]


def test_a_dry_run_tells_what_is_built_and_what_is_there() -> None:
    console, file = make_console(80)
    rows = [("teacher", "0123456789abcdef", True, 12.0), ("prune", "fedcba9876543210", False, None)]
    Screen(console).stages(rows, title="this recipe")
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines == [
        "this recipe",
        "stage key state seconds",
        "teacher 0123456789ab in the store 12 s",
        "prune fedcba987654 to be built unknown",
    ]


def test_the_store_is_listed_newest_first_with_what_is_wrong() -> None:
    console, file = make_console(100)
    shared = {"folder": Path("store"), "num_bytes": 118_000, "seconds": 12.0}
    old = Listing(stage="data", key="a" * 64, state="finished", created=time.time() - 7300, **shared)
    new = Listing(stage="prune", key="b" * 64, state="broken", created=time.time() - 60, problem="bad sum", **shared)
    Screen(console).store([old, new])
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines[1] == f"prune {'b' * 12} 118 kB 1 min 00 s 12 s broken: bad sum"
    assert lines[2] == f"data {'a' * 12} 118 kB 2 h 01 min 12 s finished"
    assert lines[3] == "2 stages, 236 kB"


def test_a_profile_gives_what_is_achieved_of_what_is_possible(result: Result) -> None:
    profile = result.baseline.profile
    assert profile is not None
    console, file = make_console(80)
    Screen(console).profile(profile, "baseline")
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert "baseline: 3.12 ms per request" in lines
    # 68 MFLOP in 0.66 * 3.12 ms are 33.0 GFLOP/s, and 2.5 times as many in two fifths of the time; 3.9 MB in 0.08 of it
    # are 15.6 GB/s.
    assert "convolution 14 66% 2.06 ms compute 33.0 of 82.6 GFLOP/s 2.50x" in lines
    assert "elementwise 22 8% 250 µs memory 15.6 of 39.1 GB/s 2.50x" in lines
    assert all(len(line) <= 80 for line in file.getvalue().splitlines())
    assert "bottleneck: compute (compute 74%, memory 9%, overhead 17%)" in lines
    assert profile.evidence[0] in lines


@pytest.mark.parametrize("width", [80, 120])
def test_every_constrained_metric_is_shown_with_its_bound_and_what_is_allowed(forecast: Result, width: int) -> None:
    table = " ".join(" ".join(table_of(show_trials(forecast, width))).split())
    assert "psnr 31.4, drop at most 1.25, allowed 2" in table
    assert "0.01242" in table
    console, file = make_console(width)
    Screen(console).summary(forecast)
    flat = " ".join(file.getvalue().replace("│", " ").split())
    assert "squared_error (test) 0.0125 -> 0.0126, drop at most 1.11 % of the baseline" in flat
    assert "psnr (test) 31.2 -> 30.9, drop at most 0.75, allowed 2" in flat


@pytest.mark.parametrize("width", [80, 120])
def test_quality_that_nothing_checked_is_said_to_be_so(unchecked: Result, width: int) -> None:
    text = show_trials(unchecked, width)
    assert "quality unchecked" in text
    assert "unknown" in "\n".join(table_of(text))
    console, file = make_console(width)
    Screen(console).summary(unchecked)
    flat = " ".join(file.getvalue().replace("│", " ").split())
    assert "quality unchecked" in flat
    assert "nan" not in flat.split()


@pytest.mark.parametrize(
    ("optimize", "line"), [("memory", "memory 212 MB -> 212 MB"), ("throughput", "rows/s 321 -> 13")]
)
def test_the_summary_shows_what_was_optimised(result: Result, optimize: str, line: str) -> None:
    console, file = make_console(100)
    Screen(console).summary(replace(result, optimize=optimize))
    assert line in " ".join(file.getvalue().replace("│", " ").split())


def test_findings_are_folded_and_never_cut() -> None:
    console, file = make_console(60)
    remedy = "not installed: pip install 'hasten[transformers]' and whatever else it takes to have it"
    Screen(console).findings("extras", [Finding("transformers", "missing", remedy), Finding("datasets", "ok", "5.0")])
    lines = file.getvalue().splitlines()
    assert lines[0] == "extras"
    assert all(len(line) <= 60 for line in lines)
    assert " ".join(" ".join(lines[1:-1]).split()) == f"transformers missing {remedy}"
    assert lines[-1].split() == ["datasets", "ok", "5.0"]


def test_the_summary_tells_what_the_other_requests_of_the_target_take(served: Result) -> None:
    console, file = make_console(160)
    Screen(console).summary(served)
    lines = file.getvalue()
    assert "p50 of 32 rows" in lines
    assert "21.6 ms -> 1.80 ms, 12.0x [" in lines
    assert "vs untouched, onnxruntime" in lines
    assert "p50 of 1 row of length 16" in lines
