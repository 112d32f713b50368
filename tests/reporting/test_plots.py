"""Labels that never cover one another, and figures that show what was measured."""

from __future__ import annotations

import re
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from hasten.core.trial import Result
from hasten.reporting import plots
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


def test_the_best_so_far_only_follows_what_was_accepted(result: Result) -> None:
    best = plots.best_so_far(result.trials)
    assert best == [3.12, 1.31, 1.31, 0.452, 0.452, 0.452, 0.452, 0.247, *[0.0741] * 4]
