"""The report's figures as SVG text: equal results give equal bytes, and nothing is drawn through global state."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hasten.core.trial import (
    PHASES,
    Evaluation,
    Interval,
    LossCurves,
    OperatorGroup,
    Profile,
    Quality,
    Result,
    StepProfile,
    TrainingResult,
    Trial,
)
from hasten.reporting import quality, units
from hasten.reporting.measures import Measure, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

VERDICT_COLOURS = {"accepted": "#1a7f37", "rejected": "#bf6a02", "failed": "#c62828"}
SHARE_COLOURS = {"compute": "#2563a8", "memory": "#7b4fa3", "overhead": "#9aa3ad"}
BARS = {"predicted": "predicted", "measured": "as it was run"}
REQUEST_COLOURS = ("#2563a8", "#bf6a02", "#1a7f37", "#7b4fa3", "#c62828", "#5c6670")
PART_COLOURS = {
    **dict(zip(PHASES, ("#c62828", "#bf6a02", "#2563a8", "#0b5d6b", "#7b4fa3", "#9aa3ad"), strict=True)),
    "communication": "#1a7f37",
}
LEVEL_COLOURS = ("#0b5d6b", "#1791a6", "#62bccb", "#a7d8e0")
"""Slopes of the levels of the memory, from the nearest on."""
INK, FAINT = "#24292f", "#8c959f"
WIDTH_INCHES = 6.6
ROOFLINE_INCHES = 4.0
CLOSE = 1.9
"""Factor between two roofs below which there is no room for a label of each."""
MANY = 30
"""Points from which on only the baseline, the best and the front are named."""
BOTTOM = 0.04
"""Height of what lies below the quality axis, as a share of the axis."""
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "axes.axisbelow": True,
}


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def overlaps(self, other: Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)

    def inside(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    clearance: float = 5.0,
    avoid: Sequence[Box] = (),
) -> list[Box]:
    """Boxes for labels, near their anchors and inside of the area where there is room, over no other label or anchor.

    Greedy: candidates lie on growing circles around the anchor; of those that are free on the smallest, the one
    farthest from what belongs to others.

    Args:
        anchors: points that the labels belong to.
        sizes: width and height of each label.
        clearance: what stays free around every anchor.
        avoid: what is written there already.
    """
    points = [Box(left=x - clearance, bottom=y - clearance, right=x + clearance, top=y + clearance) for x, y in anchors]
    placed: list[Box] = []
    for index, ((x, y), (width, height)) in enumerate(zip(anchors, sizes, strict=True)):
        taken = [*points, *placed, *avoid]
        others = [box.centre for box in (*points[:index], *points[index + 1 :], *placed)]
        for ring in range(24):
            candidates = _around(x, y, width, height, clearance + 1 + 7 * ring)
            free = [box for box in candidates if box.inside(area) and not any(box.overlaps(other) for other in taken)]
            if free:
                placed.append(max(free, key=lambda box: min((math.dist(box.centre, o) for o in others), default=0.0)))
                break
        else:  # no room inside: above everything, where nothing can be
            top = max(box.top for box in [*taken, area])
            placed.append(Box(left=x - width / 2, bottom=top, right=x + width / 2, top=top + height))
    return placed


def _around(x: float, y: float, width: float, height: float, radius: float) -> Iterable[Box]:
    for step in range(16):
        angle = math.pi / 4 + step * math.pi / 8
        centre_x = x + math.cos(angle) * (radius + width / 2)
        centre_y = y + math.sin(angle) * (radius + height / 2)
        yield Box(
            left=centre_x - width / 2,
            bottom=centre_y - height / 2,
            right=centre_x + width / 2,
            top=centre_y + height / 2,
        )


@dataclass(frozen=True, kw_only=True)
class _Height:
    """Where a quality lies on an axis that points to better ones: in per cent, or in the metric's own unit.

    Attributes:
        metric: its name.
        baseline: the untouched model's quality.
    """

    metric: str
    baseline: Quality

    @property
    def scale(self) -> float:
        return (1 if self.baseline.higher_is_better else -1) * (100 if self.baseline.points else 1)

    @property
    def least(self) -> float:
        """What is worth a picture where nothing is lost: half a point, or half a per cent of the baseline."""
        return 0.5 if self.baseline.points else 0.005 * abs(self.of(self.baseline.value)) or 0.005

    @property
    def label(self) -> str:
        unit = ", %" if self.baseline.points else ""
        hint = "" if self.baseline.higher_is_better else "\n(less is better, and higher up)"
        return f"{self.metric} on validation rows{unit}{hint}"

    def of(self, value: float) -> float:
        return self.scale * value

    def lost(self, drop: float, relative: bool) -> float:
        """What is left of the baseline after a drop."""
        share = abs(self.baseline.value) if relative else 1.0
        return self.of(self.baseline.value) - abs(self.scale) * drop * share

    def worst(self, judged: Quality) -> float | None:
        """Where it may lie at worst; None where that is of one class, or unknown."""
        if judged.drop is None or judged.drop.label is not None:
            return None
        return self.lost(judged.drop.bound, judged.drop.relative)

    def limit(self, judged: Iterable[Quality]) -> float | None:
        """The worst that is allowed; None where nothing is refused for the mean of this metric."""
        compared = next((each for each in judged if each.drop is not None), None)
        if compared is None or compared.drop is None or compared.max_drop is None or compared.drop.label is not None:
            return None
        return self.lost(compared.max_drop, compared.drop.relative)


class Compared(Protocol):
    """Trials beside one another, of a run or of a sweep: the baseline is one of them."""

    @property
    def trials(self) -> Sequence[Trial]: ...
    @property
    def baseline(self) -> Trial: ...
    @property
    def best(self) -> Trial: ...
    @property
    def front(self) -> Sequence[int]: ...
    @property
    def optimize(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """The trials whose outputs were judged, by their first metric, and where that lies on the axis."""

    qualities: Mapping[int, Quality]
    height: _Height

    @classmethod
    def of(cls, result: Compared) -> _Judged | None:
        """None where nothing judged the baseline."""
        measured = [(trial.number, trial.evaluation) for trial in result.trials if trial.evaluation is not None]
        qualities = {number: known for number, it in measured if (known := quality.first(it)) is not None}
        base = qualities.get(result.baseline.number)
        if base is None or result.baseline.evaluation is None:
            return None
        compared = next((each.drop for each in qualities.values() if each.drop is not None), None)
        points = base.points if compared is None else compared.points
        metric = result.baseline.evaluation.metric
        return cls(qualities=qualities, height=_Height(metric=metric, baseline=replace(base, points=points)))

    @property
    def heights(self) -> dict[int, float]:
        return {number: self.height.of(each.value) for number, each in self.qualities.items()}

    @property
    def limit(self) -> float | None:
        return self.height.limit(self.qualities.values())


def limit_of(result: Result) -> float | None:
    """Where the line of the worst quality that is allowed lies, in the axis' unit; None where there is none."""
    judged = _Judged.of(result)
    return None if judged is None else judged.limit


def front(result: Compared) -> str:
    """What is optimised against quality, of every trial that was measured, with the front and what the quality may be
    at worst; empty where quality is unchecked."""
    judged = _Judged.of(result)
    if judged is None:
        return ""
    measured = [(trial, trial.evaluation) for trial in result.trials if trial.evaluation is not None]
    trials = [(trial, evaluation) for trial, evaluation in measured if trial.number in judged.qualities]
    optimised, height, heights, limit = measure(result.optimize), judged.height, judged.heights, judged.limit
    floor = _quality_floor(list(heights.values()), height, limit)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        room = max(max(heights.values()) - floor, 1e-4 * height.least)
        axes.set_ylim(floor - BOTTOM * room, floor + 1.12 * room)
        _value_axis(axes, "x", [optimised.of(evaluation) for _, evaluation in trials], optimised)
        for trial, evaluation in trials:
            worst = height.worst(judged.qualities[trial.number])
            _front_point(axes, trial, optimised.of(evaluation), heights[trial.number], worst, floor)
        _verdict_key(figure, [trial for trial, _ in trials])
        on_front = sorted(
            (optimised.of(evaluation).value, max(heights[trial.number], floor))
            for trial, evaluation in trials
            if trial.number in result.front
        )
        axes.plot(*zip(*on_front, strict=True), color=INK, linewidth=1.0, alpha=0.55, zorder=1)
        axes.set_xlabel(optimised.axis)
        axes.set_ylabel(height.label)
        if not height.baseline.higher_is_better:
            _upside_down(axes)
        _front_labels(figure, axes, trials, result, heights, floor)
        if limit is not None:
            _limit_line(axes, limit, "lowest" if height.baseline.higher_is_better else "highest", height.metric)

    return _svg("front", draw, 4.3)


def _limit_line(axes: Axes, limit: float, extreme: str, metric: str) -> None:
    axes.axhline(limit, color=FAINT, linestyle="--", linewidth=0.9)
    axes.annotate(
        f"{extreme} {metric} allowed",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#57606a",
        fontsize=8,
    )


def _quality_floor(heights: Sequence[float], height: _Height, limit: float | None) -> float:
    """Where the quality axis ends: three times what may be lost, so that ruined trials don't flatten the rest."""
    base = height.of(height.baseline.value)
    allowed = base - height.least if limit is None else limit
    deepest = base - 3 * max(base - allowed, height.least)
    return max(deepest, min([allowed, *heights]))


def _front_point(axes: Axes, trial: Trial, reached: Interval, height: float, worst: float | None, floor: float) -> None:
    colour, shown = VERDICT_COLOURS[trial.verdict], max(height, floor)
    if height < floor:
        axes.plot(reached.value, shown, "v", color=colour, markersize=6.5, zorder=3, clip_on=False)
        return
    axes.errorbar(reached.value, shown, xerr=_errors(reached), color=colour, capsize=2.0, zorder=2)
    axes.plot(reached.value, shown, "o", color=colour, markersize=6.5, zorder=3)
    if worst is not None:
        axes.plot([reached.value] * 2, [worst, shown], color=colour, linewidth=0.9, alpha=0.4, zorder=1)


def _front_labels(
    figure: Figure,
    axes: Axes,
    trials: Sequence[tuple[Trial, Evaluation]],
    result: Compared,
    heights: Mapping[int, float],
    floor: float,
) -> None:
    names = {result.best.number: " best", result.baseline.number: " baseline"}
    optimised = measure(result.optimize)
    texts, anchors = [], []
    if len(trials) > MANY:
        trials = [row for row in trials if row[0].number in {*names, *result.front}]
    for trial, evaluation in trials:
        below = f" ({quality.told(evaluation)})" if heights[trial.number] < floor else ""
        texts.append(f"{trial.number}{names.get(trial.number, '')}{below}")
        anchors.append((optimised.of(evaluation).value, max(heights[trial.number], floor)))
    marked = {index for index, (trial, _) in enumerate(trials) if trial.number in names}
    _label(figure, axes, texts, anchors, bold=marked)


def best_over_iterations(result: Result) -> str:
    """What each trial reached of what is optimised, and the best so far, over the iterations."""
    optimised = measure(result.optimize)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        measured = [(trial, optimised.of(it)) for trial in result.trials if (it := trial.evaluation) is not None]
        numbers = [trial.number for trial in result.trials]
        best = best_so_far(result.trials, optimised)
        axes.step(numbers, best, where="post", color=INK, linewidth=1.4, label="best so far")
        _value_axis(axes, "y", [reached for _, reached in measured], optimised)
        for trial, reached in measured:
            colour = VERDICT_COLOURS[trial.verdict]
            axes.errorbar(trial.number, reached.value, yerr=_errors(reached), fmt="o", color=colour, ms=5.5, capsize=2)
        for trial in result.trials:
            if trial.evaluation is None:
                place = axes.get_xaxis_transform()
                axes.plot(trial.number, 0.03, "x", color=VERDICT_COLOURS[trial.verdict], transform=place, ms=6)
        axes.set_xticks(numbers)
        axes.set_xlabel("iteration")
        axes.set_ylabel(f"{optimised.name} (log scale)")
        where = "upper right" if optimised.low_is_better else "lower right"
        axes.legend(frameon=False, loc=where, fontsize=8)
        _verdict_key(figure, result.trials)

    return _svg("iterations", draw, 3.0)


def training_paces(result: TrainingResult) -> str:
    """Rows per second that each trial's training took, and the best so far, over the iterations."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        best, reached = math.nan, []
        for trial in result.trials:
            found = trial.training
            if found is None:
                place = axes.get_xaxis_transform()
                axes.plot(trial.number, 0.03, "x", color=VERDICT_COLOURS[trial.verdict], transform=place, ms=6)
            else:
                rate = found.samples_per_second
                best = rate.value if trial.verdict == "accepted" else best
                colour = VERDICT_COLOURS[trial.verdict]
                axes.errorbar(trial.number, rate.value, yerr=_errors(rate), fmt="o", color=colour, ms=5.5, capsize=2)
            reached.append(best)
        numbers = [trial.number for trial in result.trials]
        axes.step(numbers, reached, where="post", color=INK, linewidth=1.4, label="best so far")
        axes.set_xticks(numbers)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("iteration")
        axes.set_ylabel("training rows per second")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        _verdict_key(figure, result.trials)

    return _svg("paces", draw, 3.0)


def step_phases(rows: Sequence[tuple[str, StepProfile]]) -> str:
    """Where a training step's time goes, one bar for each profile, in milliseconds."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (_, profile) in enumerate(rows):
            left = 0.0
            for name, width in profile.parts_ms.items():
                axes.barh(row, width, left=left, color=PART_COLOURS[name], height=0.55)
                left += width
            axes.annotate(units.latency(profile.step_ms), (left, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max(profile.step_ms for _, profile in rows))
        axes.set_xlabel("ms per training step")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        told = {name for _, profile in rows for name in profile.parts_ms}
        _colour_key(figure, {name: colour for name, colour in PART_COLOURS.items() if name in told})

    return _svg("phases", draw, 1.1 + 0.5 * len(rows))


def losses(curves: LossCurves) -> str:
    """Mean losses of the best training beside those of the baseline, and what its seeds allow."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.fill_between(curves.rows, curves.baseline, curves.limit, color="#e6e9ec", label="allowed by the seeds")
        axes.plot(curves.rows, curves.baseline, "o-", color=FAINT, ms=4, label=f"baseline, {curves.num_seeds[0]} seeds")
        axes.plot(
            curves.rows,
            curves.candidate,
            "o-",
            color=VERDICT_COLOURS["accepted"],
            ms=4,
            label=f"best, {curves.num_seeds[1]} seed{'s' if curves.num_seeds[1] > 1 else ''}",
        )
        axes.set_xlabel("training rows seen")
        axes.set_ylabel("mean loss since the point before")
        axes.legend(frameon=False, loc="upper right", fontsize=8)

    return _svg("losses", draw, 2.6)


def best_so_far(trials: Sequence[Trial], optimised: Measure) -> list[float]:
    """What the last accepted trial reached, after each trial."""
    best = math.nan
    reached = []
    for trial in trials:
        if trial.verdict == "accepted" and trial.evaluation is not None:
            best = optimised.of(trial.evaluation).value
        reached.append(best)
    return reached


def profiles(rows: Sequence[tuple[str, Profile]]) -> str:
    """Where a request's time goes, one bar for each profile: to one scale in ms, and as shares of each request."""

    def draw(figure: Figure) -> None:
        absolute, relative = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1, 1.1)})
        names = [name for name, _ in rows]
        for row, (_, profile) in enumerate(rows):
            left = 0.0
            for kind, share in _time_shares(profile).items():
                time_ms = share * profile.latency_ms
                absolute.barh(row, time_ms, left=left * profile.latency_ms, color=SHARE_COLOURS[kind], height=0.55)
                relative.barh(row, 100 * share, left=100 * left, color=SHARE_COLOURS[kind], height=0.55)
                if share >= 0.2:
                    middle = 100 * (left + share / 2)
                    text = units.latency(time_ms)
                    relative.text(middle, row, text, ha="center", va="center", color="white", fontsize=8)
                left += share
            total = units.latency(profile.latency_ms)
            absolute.annotate(total, (profile.latency_ms, row), (4, 0), textcoords="offset points", va="center")
        absolute.set_yticks(range(len(rows)), names)
        absolute.set_ylim(len(rows) - 0.5, -0.5)
        absolute.set_xlim(0, 1.3 * max(profile.latency_ms for _, profile in rows))
        absolute.set_title("to one scale")
        absolute.set_xlabel("ms per request")
        relative.set_title("each request as a whole")
        relative.set_xlabel("share of the request, %")
        relative.set_xlim(0, 100)
        for axes in (absolute, relative):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        _colour_key(figure, {kind: SHARE_COLOURS[kind] for kind in SHARE_COLOURS if kind in rows[0][1].shares})

    return _svg("profiles", draw, 1.1 + 0.5 * len(rows))


def _time_shares(profile: Profile) -> dict[str, float]:
    """Without the share of the bytes that has to go, which is no time."""
    return {kind: share for kind, share in profile.shares.items() if kind in SHARE_COLOURS}


def rooflines(rows: Sequence[tuple[str, Profile]]) -> str:
    """Operator groups under the machine's roofs, one panel for each profile (Williams et al., CACM 2009)."""
    return _svg("roofline", lambda figure: _draw_rooflines(figure, rows), ROOFLINE_INCHES)


def save_roofline(name: str, profile: Profile, file: Path) -> None:
    """The same of one profile as a picture of its own; its ending says in which format."""
    _save(lambda figure: _draw_rooflines(figure, [(name, profile)]), ROOFLINE_INCHES + 0.4, file)


def _draw_rooflines(figure: Figure, rows: Sequence[tuple[str, Profile]]) -> None:
    panels = figure.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
    groups = [[group for group in profile.operators if group.flops and group.milliseconds] for _, profile in rows]
    points = [_roofline_point(group) for row in groups for group in row]
    peaks = [rate for _, profile in rows for rate in _ending("_gops", profile).values()]
    intensities, rates = [intensity for intensity, _ in points], [rate for _, rate in points] or [1.0]
    low, high = min([*intensities, 0.05]) / 2, max([*intensities, 20.0]) * 4
    written: list[list[Annotation]] = []
    for axes, (title, profile), row in zip(panels, rows, groups, strict=True):
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(rates) / 3, 3 * max([*rates, *peaks])))
        _plain_ticks(axes)
        axes.set_title(title)
        axes.set_xlabel("arithmetic intensity, FLOP per byte")
        written.append(_roofs(axes, profile, low, high))
        for group in row:
            size = 16 + 140 * group.share
            axes.scatter(*_roofline_point(group), s=size, color=SHARE_COLOURS[group.bound], alpha=0.85, zorder=3)
    panels[0].set_ylabel("achieved, GFLOP/s")
    _colour_key(figure, {f"bound by {kind}": SHARE_COLOURS[kind] for kind in ("compute", "memory")})
    _level_key(figure, rows[0][1])
    for axes, row, texts in zip(panels, groups, written, strict=True):
        labels, points = [f"{group.kind} {group.share:.0%}" for group in row], [_roofline_point(group) for group in row]
        _label(figure, axes, labels, points, clearance=6.5, avoid=texts)


def _roofline_point(group: OperatorGroup) -> tuple[float, float]:
    """Intensity in FLOP per byte, and what is achieved in GFLOP/s."""
    return group.intensity, group.flops / group.milliseconds / 1e6


def _ending(ending: str, profile: Profile) -> dict[str, float]:
    """`float32` or `l2` -> rate of the roofs whose names end so, the highest first."""
    found = {name.removesuffix(ending): rate for name, rate in profile.roofline.items() if name.endswith(ending)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _roofs(axes: Axes, profile: Profile, low: float, high: float) -> list[Annotation]:
    """Ceilings of arithmetic, and a slope for each level of the memory, up to the highest ceiling; gives the labels.

    The ceilings carry their names on the left, where no slope reaches them and no operator can be.
    """
    peaks, slopes = _ending("_gops", profile), _ending("_gbs", profile)
    for name, roof in peaks.items():
        axes.plot([low, high], [roof, roof], color=INK, linewidth=1.0, linestyle="-" if name == "float32" else "--")
    ceiling = max(peaks.values(), default=math.inf)
    for rate, colour in zip(slopes.values(), LEVEL_COLOURS, strict=False):
        end = min(high, ceiling / rate)
        axes.plot([low, end], [low * rate, end * rate], color=colour, linewidth=1.2)
    on_top: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": INK}
    return [axes.annotate(names, (low, roof), (3, 2), **on_top) for names, roof in _neighbours(peaks)]


def _level_key(figure: Figure, profile: Profile) -> None:
    """Which slope is which level of the memory, with its bandwidth."""
    from matplotlib.lines import Line2D

    slopes = zip(_ending("_gbs", profile).items(), LEVEL_COLOURS, strict=False)
    handles = [
        Line2D([], [], color=colour, label=f"{level.upper()} {units.digits(rate)} GB/s")
        for (level, rate), colour in slopes
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _neighbours(roofs: Mapping[str, float]) -> list[tuple[str, float]]:
    """Labels of the roofs with their rates, one for those that lie too close for two, at the highest of them."""
    merged: list[tuple[str, float]] = []
    lowest = math.inf
    for name, rate in sorted(roofs.items(), key=lambda item: -item[1]):
        told = f"{name} {units.digits(rate)}"
        if merged and lowest < CLOSE * rate:
            merged[-1] = (f"{merged[-1][0]}, {told}", merged[-1][1])
        else:
            merged.append((told, rate))
        lowest = rate
    return merged


def _label(
    figure: Figure,
    axes: Axes,
    texts: Sequence[str],
    anchors: Sequence[tuple[float, float]],
    bold: Collection[int] = (),
    clearance: float = 5.0,
    avoid: Sequence[Annotation] = (),
) -> None:
    """Writes labels beside points so that none covers another; a line leads back from those that had to go far."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    spots = [(float(x) * to_points, float(y) * to_points) for x, y in (axes.transData.transform(at) for at in anchors)]
    frame = axes.get_window_extent()
    left, bottom, right, top = (float(edge) * to_points for edge in (frame.x0, frame.y0, frame.x1, frame.y1))
    sizes = [(5.4 * len(text) + 2, 10.0) for text in texts]
    extents = [label.get_window_extent() for label in avoid]
    written = [
        Box(left=it.x0 * to_points, bottom=it.y0 * to_points, right=it.x1 * to_points, top=it.y1 * to_points)
        for it in extents
    ]
    boxes = place_labels(spots, sizes, Box(left=left, bottom=bottom, right=right, top=top), clearance, written)
    for index, (text, anchor, spot, box) in enumerate(zip(texts, anchors, spots, boxes, strict=True)):
        middle = ((box.left + box.right) / 2 - spot[0], (box.bottom + box.top) / 2 - spot[1])
        far = math.hypot(*middle) > 16 + sizes[index][0] / 2
        axes.annotate(
            text,
            anchor,
            middle,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if index in bold else "normal",
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if far else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},  # over lines, still readable
            zorder=4,
            annotation_clip=False,
        )


def gantt(charts: Sequence[Mapping[str, Any]]) -> str:
    """Which device works on what and when, as predicted above as it was run; one colour a request.

    Args:
        charts: of each plan its name as `plan`, and as `predicted` and `measured` bars of request, stage, device, start
            and end in seconds.
    """
    rows = [(chart["plan"], told, chart[key]) for chart in charts for key, told in BARS.items()]
    devices = sorted({device for *_, bars in rows for _, _, device, *_ in bars})

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
        for axes, (plan, told, bars) in zip(grid[:, 0], rows, strict=True):
            axes.set_title(f"{plan}, {told}")
            for request, _, device, start, end in bars:
                place, colour = devices.index(device), REQUEST_COLOURS[request % len(REQUEST_COLOURS)]
                axes.barh(place, 1e3 * (end - start), left=1e3 * start, height=0.7, color=colour, edgecolor="white")
                middle = 1e3 * (start + end) / 2
                axes.text(middle, place, str(request), ha="center", va="center", color="white", fontsize=7.5)
            axes.set_yticks(range(len(devices)), devices)
            axes.set_ylim(len(devices) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
        grid[-1, 0].set_xlabel("ms; numbers are requests")

    return _svg("gantt", draw, 0.6 + (0.45 + 0.3 * len(devices)) * len(rows))


def _value_axis(axes: Axes, which: str, values: Sequence[Interval], optimised: Measure) -> None:
    """A log axis whose few ticks carry their unit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = min(value.low for value in values) / 1.35, max(value.high for value in values) * 1.5
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    dense = high / low < 1000
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if dense else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: optimised.tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _upside_down(axes: Axes) -> None:
    """Ticks of an axis on which values were negated, so that better is higher up."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))


def _plain_ticks(axes: Axes) -> None:
    """`0.1` instead of ten to the minus one."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _errors(interval: Interval) -> list[list[float]]:
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _verdict_key(figure: Figure, trials: Sequence[Trial]) -> None:
    given = {trial.verdict for trial in trials}
    _colour_key(figure, {verdict: colour for verdict, colour in VERDICT_COLOURS.items() if verdict in given})


def _colour_key(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8)


def _save(draw: Any, height_inches: float, file: Path) -> None:
    """One figure on white, to stand alone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained", facecolor="white")
        draw(figure)
        figure.savefig(file, dpi=160)


def latencies(rows: Sequence[tuple[str, Mapping[str, Interval]]]) -> str:
    """Percentiles of one request's latency with their intervals, of several beside one another."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        percentiles = list(rows[0][1])
        for place, (name, found) in enumerate(rows):
            heights = [line + 0.28 * (place - (len(rows) - 1) / 2) for line in range(len(percentiles))]
            values = [found[percentile] for percentile in percentiles]
            errors = [[it.value - it.low for it in values], [it.high - it.value for it in values]]
            points = [it.value for it in values]
            colour = REQUEST_COLOURS[place % len(REQUEST_COLOURS)]
            axes.errorbar(points, heights, xerr=errors, fmt="o", markersize=5, capsize=3, color=colour, label=name)
            for it, height in zip(values, heights, strict=True):
                told = units.latency(it.value)
                axes.annotate(told, (it.high, height), (6, -3), textcoords="offset points", color=colour, fontsize=8)
        axes.set_yticks(range(len(percentiles)), percentiles)
        axes.set_ylim(len(percentiles) - 0.4, -0.6)
        axes.set_xlim(0, 1.15 * max(it.high for _, found in rows for it in found.values()))
        axes.set_xlabel("milliseconds of one request")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(rows), frameon=False)

    return _svg("latencies", draw, 2.7)


def _svg(name: str, draw: Any, height_inches: float) -> str:
    """One figure as an `<svg>` element whose ids are its own, to stand in a page beside others."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained", facecolor="none")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
