from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.trial import Trial
from hasten.planning.prior import Lesson, correction, lessons, read_prior

MakeTrial = Callable[..., Trial]


def lesson(expected: float, measured: float, strategy: str = "engine") -> Lesson:
    return Lesson(strategy=strategy, expected_gain=expected, measured_gain=measured)


def test_without_trials_the_declaration_stands() -> None:
    assert correction("engine", []) == 1.0
    assert correction("engine", [lesson(2.0, 1.0, strategy="other")]) == 1.0


def test_one_trial_weighs_as_much_as_the_declaration() -> None:
    # 4x was expected and 2x measured, half of it on the logarithmic scale: (1 + 0.5) / 2.
    assert correction("engine", [lesson(4.0, 2.0)]) == pytest.approx(0.75)


def test_no_gain_counts_as_none_and_never_as_less() -> None:
    assert correction("engine", [lesson(4.0, 1.0)]) == pytest.approx(0.5)
    assert correction("engine", [lesson(4.0, 0.5)]) == pytest.approx(0.5)


def test_one_lucky_trial_counts_twice_at_most() -> None:
    assert correction("engine", [lesson(1.1, 50.0)]) == pytest.approx((1 + 2) / 2)


def test_a_corrected_expectation_is_not_corrected_twice() -> None:
    # 4x declared and no gain: 2x is expected next. 2x measured is half of what was declared: (1 + 0 + 1/2) / 3.
    assert correction("engine", [lesson(4.0, 1.0), lesson(2.0, 2.0)]) == pytest.approx(0.5)


@given(declared=st.floats(1.05, 20), share=st.floats(0, 1.5), num_trials=st.integers(30, 60))
def test_what_is_measured_again_and_again_is_believed(declared: float, share: float, num_trials: int) -> None:
    taught: list[Lesson] = []
    for _ in range(num_trials):
        expected = math.exp(math.log(declared) * correction("engine", taught))
        taught.append(lesson(expected, declared**share))
    assert correction("engine", taught) == pytest.approx((1 + num_trials * share) / (1 + num_trials))


def test_rejected_and_failed_trials_teach_that_nothing_was_gained(trial: MakeTrial) -> None:
    history = [
        trial(0),
        trial(1, strategy="engine", verdict="rejected", expected_gain=2.0, measured_gain=1.9),
        trial(2, strategy="engine", verdict="failed", expected_gain=1.5),
    ]
    assert lessons(history) == (lesson(2.0, 1.0), lesson(1.5, 1.0))


def test_a_gain_counts_against_the_parent_that_was_edited(trial: MakeTrial) -> None:
    # The second alternative is 1.2 times as fast as the first, which is twice as fast as the parent of both.
    history = [
        trial(0),
        trial(1, parent=0, strategy="engine", expected_gain=1.5, measured_gain=2.0),
        trial(2, parent=0, strategy="engine", expected_gain=1.6, measured_gain=1.2),
        trial(3, parent=2, strategy="other", expected_gain=1.5, measured_gain=1.1),
    ]
    assert [each.measured_gain for each in lessons(history)] == pytest.approx([2.0, 2.4, 1.1])


def test_trials_without_an_expectation_teach_nothing(trial: MakeTrial) -> None:
    assert lessons([trial(0), trial(1, measured_gain=3.0), trial(2, expected_gain=1.0, measured_gain=3.0)]) == ()


def test_reads_what_an_earlier_run_left(tmp_path: Path, trial: MakeTrial) -> None:
    history = [trial(0), trial(1, strategy="engine", expected_gain=2.0, measured_gain=1.5)]
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"trials": [each.to_dict() for each in history], "experiment": "x"}))
    assert read_prior(str(file)) == lessons(history) == (lesson(2.0, 1.5),)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "3",
        "{}",
        '{"trials": 3}',
        '{"trials": [3]}',
        '{"trials": [{}]}',
        '{"trials": [{"verdict": "accepted", "expected_gain": 2.0}]}',
        '{"trials": [{"strategy": "engine", "verdict": "accepted", "expected_gain": "fast"}]}',
        '{"trials": [{"strategy": "engine", "verdict": "accepted", "expected_gain": 2.0, "measured_gain": -1}]}',
        '{"trials": [{"strategy": "engine", "verdict": "accepted", "expected_gain": NaN, "measured_gain": 1}]}',
    ],
)
def test_names_the_knob_where_the_file_is_no_summary(tmp_path: Path, text: str) -> None:
    file = tmp_path / "summary.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^planner\.prior=.*summary\.json is no summary\.json of a run: .+"):
        read_prior(str(file))


def test_names_the_knob_where_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^planner\.prior=.*can't be read: No such file"):
        read_prior(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("earlier", "now", "fits"), [("p50", "throughput", True), ("size", "size", True), ("size", "p99", False)]
)
def test_bytes_saved_earlier_teach_nothing_about_time(tmp_path: Path, earlier: str, now: str, fits: bool) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"trials": [], "optimize": earlier}))
    if fits:
        assert read_prior(str(file), now) == ()
    else:
        with pytest.raises(ConfigError, match="optimised size, which teaches nothing about p99"):
            read_prior(str(file), now)
