"""How drops and qualities are told, and when they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.core.trial import Certificate, Drop, Interval, Quality, Result, Trial

DROP = Drop(value=0.012, bound=0.03, confidence=0.95, rows=400)
QUALITY = Quality(value=0.984, drop=DROP, max_drop=0.03, higher_is_better=True)


def test_a_difference_is_told_in_the_unit_of_its_metric() -> None:
    assert DROP.told(0.012) == "1.20 points"
    assert replace(DROP, points=False).told(0.01234567) == "0.01235"
    assert replace(DROP, relative=True, points=False).told(0.012) == "1.20 % of the baseline"
    assert replace(DROP, relative=True).told(0.012) == "1.20 % of the baseline"


def test_a_value_is_told_in_per_cent_only_where_it_is_a_share_of_rows() -> None:
    assert QUALITY.told() == "98.4 %"
    assert QUALITY.told(0.5) == "50.0 %"
    assert replace(QUALITY, drop=None, points=False).told() == "0.984"
    assert replace(QUALITY, drop=replace(DROP, points=False)).told() == "0.984"


def test_the_class_that_may_have_lost_most_is_named() -> None:
    assert DROP.subject("accuracy") == "accuracy"
    assert replace(DROP, label=3).subject("recall") == "recall of class 3"


@pytest.mark.parametrize(
    ("drop", "max_drop", "holds"),
    [
        (DROP, 0.03, True),
        (DROP, 0.029, False),
        (DROP, None, True),
        (None, None, True),
        (None, 1.0, False),
    ],
)
def test_holds_where_the_bound_lies_inside_what_is_tolerated(
    drop: Drop | None, max_drop: float | None, holds: bool
) -> None:
    assert replace(QUALITY, drop=drop, max_drop=max_drop).holds == holds


def test_where_nothing_can_judge_nothing_is_held_and_no_figure_is_known() -> None:
    unchecked = Certificate.unchecked("Quality unchecked: the rows have no labels")
    assert (unchecked.held, unchecked.checked, unchecked.rows) == (False, False, 0)
    told = unchecked.to_dict()
    assert {name for name, value in told.items() if value is None} == {
        "baseline",
        "candidate",
        "drop",
        "margin",
        "bound",
        "confidence",
    }


ONE = Interval(value=1.0, low=1.0, high=1.0)


def made(number: int, parent: int | None, gain: float | None, *, accepted: bool = True) -> Trial:
    return Trial(
        number=number,
        parent=parent,
        overrides=(),
        edit=(),
        strategy="",
        bottleneck="",
        verdict="accepted" if accepted else "rejected",
        reason="",
        measured_gain=gain,
    )


def ended(*trials: Trial, best: int) -> Result:
    return Result(
        experiment="made up",
        baseline=trials[0],
        best=trials[best],
        trials=trials,
        speedup={"eager": ONE},
        size_ratio=1.0,
        certificate=Certificate.unchecked(""),
        front=(),
        stopped="",
        binding=None,
        engine_reference="eager",
        seconds=0.0,
        spent=0.0,
        machine={},
        model_folder="",
        tracking_command=None,
    )


def test_the_shares_of_the_steps_multiply_to_the_whole_gain() -> None:
    result = ended(
        made(0, None, None),
        made(1, 0, 2.0),  # an engine
        made(2, 0, 1.5),  # another one in its place: 2.0 * 1.5 against the recipe that both edit
        made(3, 2, 0.9, accepted=False),
        made(4, 2, 1.2),
        made(5, 4, 1.1, accepted=False),
        best=4,
    )
    assert [trial.number for trial in result.lineage] == [0, 2, 4]
    assert [(step.number, gain) for step, gain in result.shares] == [(2, 3.0), (4, 1.2)]


def test_a_single_recipe_gave_it_all_whatever_the_verdict() -> None:
    result = ended(made(0, None, None), made(1, 0, 0.8, accepted=False), best=1)
    assert [(step.number, gain) for step, gain in result.shares] == [(1, 0.8)]
    assert ended(made(0, None, None), best=0).shares == ()
