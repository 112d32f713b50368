"""Figures as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.trial import Interval
from hasten.reporting import units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.latency(0.4123), "412 µs"),
        (units.latency(0.0741), "74.1 µs"),
        (units.latency(1.234), "1.23 ms"),
        (units.latency(2100), "2.10 s"),
        (units.latency(0.0), "0 µs"),
        (units.latency_interval(Interval(value=1.01, low=0.99, high=1.031)), "1.01 [0.990, 1.03] ms"),
        (units.size(118_000), "118 kB"),
        (units.size(4_390_000), "4.39 MB"),
        (units.size(512), "512 B"),
        (units.duration(0.42), "0.420 s"),
        (units.duration(59.4), "59 s"),
        (units.duration(185), "3 min 05 s"),
        (units.duration(7800), "2 h 10 min"),
        (units.duration(400_000), "4 d 15 h"),
        (units.ratio(42.13), "42.1x"),
        (units.ratio(0.963), "0.96x"),
        (units.ratio_interval(Interval(value=103.4, low=99.6, high=108.0)), "103x [99.6, 108]"),
        (units.points(0.0149), "1.49 points"),
        (units.share(0.9844), "98.4 %"),
        (units.count(69_000_000), "69.0 M"),
        (units.digits(-0.01234), "-0.0123"),
    ],
)
def test_reads_as_expected(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(min_value=1e-4, max_value=1e6))
def test_three_digits_are_never_off_by_more_than_half_a_percent(value: float) -> None:
    assert abs(float(units.digits(value)) / value - 1) <= 0.005 + 1e-12
