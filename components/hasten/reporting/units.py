"""Figures as people read them: three significant digits and the unit that fits."""

from __future__ import annotations

from hasten.core.trial import Interval, OperatorGroup

_LATENCY = (("s", 1e3), ("ms", 1.0), ("µs", 1e-3))
_BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def digits(value: float) -> str:
    """Three significant digits without an exponent: `0.0123`, `1.20`, `42.1`, `1234`."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    magnitude = f"{value:.2e}".partition("e")[2]
    return f"{value:.{max(0, 2 - int(magnitude))}f}"


def latency(milliseconds: float) -> str:
    """`412 µs`, `1.23 ms`, `2.10 s`."""
    unit, size = _fitting(_LATENCY, milliseconds)
    return f"{digits(milliseconds / size)} {unit}"


def latency_interval(milliseconds: Interval) -> str:
    """`1.23 [1.20, 1.27] ms`, all three in one unit."""
    unit, size = _fitting(_LATENCY, milliseconds.value)
    value, low, high = (digits(bound / size) for bound in (milliseconds.value, milliseconds.low, milliseconds.high))
    return f"{value} [{low}, {high}] {unit}"


def size(num_bytes: float) -> str:
    """`980 kB`, `4.20 MB`, powers of ten."""
    unit, scale = _fitting(_BYTES, num_bytes)
    return f"{num_bytes:.0f} B" if unit == "B" else f"{digits(num_bytes / scale)} {unit}"


def duration(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3 min 05 s`, `2 h 10 min`, `4 d 15 h`."""
    if seconds < 10:
        return f"{digits(seconds)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def ratio(value: float) -> str:
    """`42.1x`, `0.96x`: never more than two decimals."""
    return f"{_ratio(value)}x"


def ratio_interval(value: Interval) -> str:
    """`42.1x [40.2, 44.0]`."""
    return f"{_ratio(value.value)}x [{_ratio(value.low)}, {_ratio(value.high)}]"


def share(value: float) -> str:
    """`98.7 %`."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares: `1.20 points`."""
    return f"{100 * value:.2f} points"


def count(value: float) -> str:
    """`812`, `1.10 k`, `1.10 M`, `2.30 G`."""
    for unit, scale in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if abs(value) >= scale:
            return f"{digits(value / scale)}{unit}"
    return f"{value:.0f}"


def reached(group: OperatorGroup) -> tuple[str, str]:
    """`33.0 of 82.5 GFLOP/s` and `2.50x`: achieved of what the roofline allows, and the factor between both."""
    if group.headroom is None or group.milliseconds <= 0:
        return "-", "-"
    return f"{digits(group.achieved)} of {digits(group.possible)} {group.unit}", ratio(group.headroom)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else digits(value)


def _fitting(units: tuple[tuple[str, float], ...], value: float) -> tuple[str, float]:
    """The largest unit of which there is at least one, else the smallest."""
    return next((unit for unit in units if abs(value) >= unit[1]), units[-1])
