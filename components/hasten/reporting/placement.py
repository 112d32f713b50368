"""How a model was shared out between devices, for people: tables, and a Gantt chart of what was predicted and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.core.files import write_text
from hasten.core.trial import Interval
from hasten.reporting import units
from hasten.reporting.plots import gantt

PLACEMENT, CHART = "placement.json", "gantt.svg"

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows."""


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Segments with their times, the ways between devices, and the plans.

    Args:
        found: what the compile stage left as `placement.json`.
    """
    told = [_plans(found)]
    if found["segments"]:
        told = [_segments(found), _ways(found), *told]
    return told


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The choice and its reason."""
    return [f"chosen: {found['chosen']}", found["why"]]


def write_chart(found: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws the plans for several devices, where there are any, and says so."""
    if not found["charts"]:
        return []
    write_text(folder / CHART, gantt(found["charts"]))
    return [f"drawn as predicted and as they were run: {folder / CHART}"]


def _segments(found: Mapping[str, Any]) -> Table:
    devices = found["devices"]
    rows = [
        (
            segment["writes"],
            f"{segment['share']:.0%}",
            units.size(segment["bytes"]),
            *(_time(segment["seconds"].get(device)) for device in devices),
        )
        for segment in found["segments"]
    ]
    return "segments of the graph, by what they write", ("segment", ">work", ">writes", *_right(devices)), rows


def _ways(found: Mapping[str, Any]) -> Table:
    rows = [
        (f"{way['from']} to {way['to']}", _time(way["seconds"]), _time(way["seconds_per_mb"])) for way in found["ways"]
    ]
    return "what handing a tensor over costs", ("way", ">each", ">per MB"), rows


def _plans(found: Mapping[str, Any]) -> Table:
    streams, batch = found["optimize"] == "throughput", found["batch_size"]
    rows = []
    for plan in found["plans"]:
        seconds, ratio = Interval(**plan["seconds"]), Interval(**plan["ratio"])
        off = plan["predicted_seconds"] / seconds.value - 1
        rows.append(
            (
                plan["name"],
                _speed(plan["predicted_seconds"], batch, streams),
                _speeds(seconds, batch, streams),
                f"{100 * off:+.0f}%",
                units.ratio_interval(ratio),
            )
        )
    what = "rows per second" if streams else "time of a request"
    columns = ("plan", ">predicted", ">measured", ">off", ">vs best single")
    return f"plans, measured in turns: {what}", columns, rows


def _speed(seconds: float, batch: int, streams: bool) -> str:
    return units.digits(batch / seconds) if streams else _time(seconds)


def _speeds(seconds: Interval, batch: int, streams: bool) -> str:
    if not streams:
        return units.latency_interval(_scaled(seconds, 1e3))
    rows = Interval(value=batch / seconds.value, low=batch / seconds.high, high=batch / seconds.low)
    return f"{units.digits(rows.value)} [{units.digits(rows.low)}, {units.digits(rows.high)}]"


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else units.latency(1e3 * seconds)


def _right(names: Sequence[str]) -> Iterator[str]:
    return (f">{name}" for name in names)
