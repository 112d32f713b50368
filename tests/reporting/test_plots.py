"""Labels that never cover one another, and figures that show what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.trial import Result
from hasten.reporting import plots
from hasten.reporting.measures import measure
from hasten.reporting.plots import Box, place_labels

AREA = Box(left=0, bottom=0, right=400, top=250)
points = st.tuples(st.floats(5, 395), st.floats(5, 245))
sizes = st.tuples(st.floats(6, 80), st.just(10.0))


@given(st.lists(st.tuples(points, sizes), max_size=16))
def test_no_label_covers_another_label_or_a_point(
    labels: list[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    anchors = [anchor for anchor, _ in labels]
    boxes = place_labels(anchors, [size for _, size in labels], AREA)
    dots = [Box(left=x - 5, bottom=y - 5, right=x + 5, top=y + 5) for x, y in anchors]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.overlaps(dot) for box in boxes for dot in dots)


@given(points, sizes)
def test_a_lone_label_stands_inside_and_near_its_point(anchor: tuple[float, float], size: tuple[float, float]) -> None:
    [box] = place_labels([anchor], [size], AREA)
    assert box.inside(AREA)
    assert abs(box.centre[0] - anchor[0]) <= size[0] / 2 + 20
    assert abs(box.centre[1] - anchor[1]) <= size[1] / 2 + 20


def test_the_front_numbers_every_measured_trial(result: Result) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plots.front(result))
    labels = {re.split(r"\D", text.strip())[0] for text in texts if re.match(r"^\d+( baseline| best| \(.*\))?$", text)}
    measured = {str(trial.number) for trial in result.trials if trial.evaluation is not None}
    assert measured <= labels
    assert {"0 baseline", "8 best", "10 (31.2 %)"} <= set(texts)


def test_axes_carry_units(result: Result) -> None:
    assert "100 µs" in plots.front(result)
    assert "accuracy on validation rows, %" in plots.front(result)
    profile = result.baseline.profile
    assert profile is not None
    assert "ms per request" in plots.profiles([("baseline", profile)])
    assert "GFLOP/s" in plots.rooflines([("baseline", profile)])
    assert "FLOP per byte" in plots.rooflines([("baseline", profile)])


def test_the_roofline_names_every_roof_and_the_share_of_every_group(result: Result) -> None:
    profile = result.baseline.profile
    assert profile is not None
    drawn = plots.rooflines([("baseline", profile), ("best", profile)])
    for label in ("float32 92.0", "bfloat16 150", "int8 310", "L1 210 GB/s", "DRAM 17.0 GB/s", "bound by memory"):
        assert label in drawn, label
    for group in ("convolution 66%", "elementwise 8%", "linear 2%"):
        assert drawn.count(group) == 2
    assert "copy" not in drawn, "what calculates nothing has no intensity"


def test_a_roofline_is_drawn_where_nothing_calculates_and_no_roof_is_known(result: Result) -> None:
    profile = result.baseline.profile
    assert profile is not None
    bare = replace(profile, operators=profile.operators[-1:], roofline={})
    assert "GFLOP/s" in plots.rooflines([("baseline", bare)])


def test_the_best_so_far_only_follows_what_was_accepted(result: Result) -> None:
    best = plots.best_so_far(result.trials, measure("p50"))
    assert best == [3.12, 1.31, 1.31, 0.452, 0.452, 0.452, 0.452, 0.247, *[0.0741] * 4]


def test_what_should_be_low_is_lower_on_the_axis_the_worse_it_is(forecast: Result) -> None:
    svg = plots.front(forecast)
    assert "squared_error on validation rows" in svg
    assert "less is better" in svg
    assert "highest squared_error allowed" in svg
    values = [float(text) for text in re.findall(r">(0\.01\d*)</text>", svg)]
    assert values
    assert all(value > 0 for value in values)


def test_the_line_of_what_is_allowed_lies_where_the_margin_ends(forecast: Result, result: Result) -> None:
    # 2 % above 0.0123, and 2 points below 98.44 %.
    assert plots.limit_of(forecast) == pytest.approx(-0.0123 * 1.02)
    assert plots.limit_of(result) == pytest.approx(96.44)


def test_there_is_no_front_where_nothing_judged_the_outputs(unchecked: Result) -> None:
    assert plots.front(unchecked) == ""
    assert "<svg" in plots.best_over_iterations(unchecked)


@pytest.mark.parametrize(
    ("optimize", "axis", "tick"),
    [("size", "size", "1 MB"), ("throughput", "rows per second", "10 k"), ("memory", "peak memory", "200 MB")],
)
def test_figures_show_what_was_optimised(made_up: Callable[..., Result], optimize: str, axis: str, tick: str) -> None:
    result = made_up(optimize=optimize)
    for svg in (plots.front(result), plots.best_over_iterations(result)):
        assert f">{axis} (" in svg
        assert f">{tick}<" in svg
