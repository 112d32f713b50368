"""How drops and qualities are told, and when they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.core.trial import Certificate, Drop, Quality

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
