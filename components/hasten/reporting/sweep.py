"""What a sweep found: a table, the front, `sweep.json`, and a report with parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hasten.core.trial import Interval, Trial
from hasten.reporting import plots, quality, units
from hasten.reporting.facts import finite
from hasten.reporting.measures import Measure, measure
from hasten.reporting.page import page

REQUESTS_HEAD = ("latency p50", "vs eager", "quality", "drop <=", "size")
TRAINING_HEAD = ("rows/s", "vs plain", "memory")
MISSING = "–"
WIDTH, HEIGHT, MARGIN = 960, 400, (46, 70, 26, 70)
"""Of the parallel coordinates, and what is free above, right, below and left of the axes."""
NUMBERS_FROM = 8
"""Different values of a choice from which on numbers lie on a scale instead of beside one another."""
SPREAD = 16
"""Height in which lines that share a choice lie beside one another."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command line of a sweep, as it is reported.

    Attributes:
        number: from 1 on, as the sweep counts them.
        choices: key -> value that tells it from the others.
        folder: where its results lie, relative to the sweep's.
        verdict: accepted, rejected or failed.
        trial: what was measured; None where it failed.
        rebuild: the command line that builds and measures it again.
    """

    number: int
    choices: Mapping[str, str]
    folder: str
    verdict: str
    reason: str
    seconds: float
    trial: Trial | None
    rebuild: str

    @property
    def told(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.choices.items()) or self.folder

    @property
    def short(self) -> list[str]:
        """The choices without the groups of their knobs."""
        return [f"{key.rpartition('.')[2]}={value}" for key, value in self.choices.items()] or [self.folder]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All of a sweep that has come to its end.

    Attributes:
        name: of its folder.
        experiment: whose model and data it was.
        command: that started it.
        optimize: `objective.optimize` of its jobs.
        total: jobs that it has; None where nobody knows.
        untouched: the untouched model that the jobs were measured against; None where none was measured.
        one_baseline: whether all jobs were measured against the same.
        notes: one sentence each, of whoever searched.
    """

    name: str
    experiment: str
    command: str
    optimize: str
    jobs: tuple[Job, ...]
    total: int | None = None
    untouched: Trial | None = None
    one_baseline: bool = True
    notes: tuple[str, ...] = ()

    @property
    def training(self) -> bool:
        """Whether trainings were measured, and not requests."""
        return any(job.trial is not None and job.trial.training is not None for job in self.jobs)

    @property
    def measured(self) -> list[Job]:
        return [job for job in self.jobs if job.trial is not None]

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.verdict == "failed"]

    @cached_property
    def front(self) -> tuple[int, ...]:
        """Numbers of the jobs that no other beats in what is optimised and in quality at once."""
        places = {job.number: self._place(job) for job in self.measured}
        return tuple(
            number for number, mine in places.items() if not any(_dominates(it, mine) for it in places.values())
        )

    def _place(self, job: Job) -> tuple[float, float]:
        """Cost and loss of quality, both the better the lower."""
        return self.cost(job), -(_quality(job) or 0.0)

    def cost(self, job: Job) -> float:
        """Something that falls as a job gets better in what is optimised; infinite where it was not measured."""
        trial = job.trial
        if trial is not None and trial.training is not None:
            return -trial.training.samples_per_second.value
        return math.inf if trial is None or trial.evaluation is None else self.optimised.cost(trial.evaluation)

    @property
    def optimised(self) -> Measure:
        return measure(self.optimize)

    @cached_property
    def chosen(self) -> Job | None:
        """The best of those that were accepted."""
        accepted = [job for job in self.measured if job.verdict == "accepted"]
        return min(accepted, key=self.cost, default=None)

    @property
    def ranked(self) -> list[Job]:
        """The best first; those that failed come last."""
        return sorted(self.jobs, key=lambda job: (job.trial is None, self.cost(job), job.number))

    # What `plots.front` draws.

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The untouched model as number 0, and the jobs by their numbers."""
        untouched = [self.untouched] if self.untouched is not None else []
        return (*untouched, *(job.trial for job in self.measured if job.trial is not None))

    @property
    def baseline(self) -> Trial:
        return self.trials[0]

    @property
    def best(self) -> Trial:
        return self.chosen.trial if self.chosen is not None and self.chosen.trial is not None else self.baseline


def claim(sweep: Sweep) -> str:
    """The whole sweep in one sentence."""
    if sweep.chosen is None:
        return f"{sweep.experiment}: none of {len(sweep.jobs)} jobs was accepted."
    ratio = sweep.best.speedup.get("plain" if sweep.training else "eager")
    what = "trains" if sweep.training else "runs"
    against = "as a plain script" if sweep.training else "as in eager PyTorch"
    best = f"job {sweep.chosen.number} is the best of {len(sweep.jobs)}"
    if ratio is None or sweep.best.number == 0:
        return f"{sweep.experiment}: {best}, {_figure(sweep)}."
    return (
        f"{sweep.experiment}: {best}, {_figure(sweep)}; it {what} {units.digits(ratio.value)} times as fast {against}."
    )


def _figure(sweep: Sweep) -> str:
    assert sweep.chosen is not None
    if sweep.training:
        assert sweep.best.training is not None
        return f"{units.count(sweep.best.training.samples_per_second.value)} rows/s"
    assert sweep.best.evaluation is not None
    known = quality.first(sweep.best.evaluation)
    told = f" and {sweep.best.evaluation.metric} {known.told()}" if known is not None else ""
    return f"{sweep.optimised.name} {sweep.optimised.told(sweep.optimised.of(sweep.best.evaluation).value)}{told}"


def head(sweep: Sweep) -> tuple[str, ...]:
    """Names of the figures of a job; those of its quality by the metric."""
    if sweep.training:
        return TRAINING_HEAD
    evaluations = [trial.evaluation for trial in sweep.trials if trial.evaluation is not None]
    metric = evaluations[0].metric if evaluations else "quality"
    unit = quality.bound_unit(sweep.trials)
    named = {"quality": metric, "drop <=": f"drop <=, {unit}" if unit else "drop <="}
    return tuple(named.get(name, name) for name in REQUESTS_HEAD)


def figures(sweep: Sweep, trial: Trial | None) -> tuple[str, ...]:
    """As `head` names them."""
    if trial is None:
        return (MISSING,) * len(head(sweep))
    if trial.training is not None:
        step = trial.training
        return (
            units.count(step.samples_per_second.value),
            _ratio(trial.speedup.get("plain")),
            units.size(step.memory_bytes),
        )
    evaluation = trial.evaluation
    if evaluation is None:
        return (MISSING,) * len(REQUESTS_HEAD)
    return (
        "emulated" if evaluation.emulated else units.latency_interval(evaluation.latency_ms["p50"]),
        _ratio(trial.speedup.get("eager")),
        quality.told(evaluation),
        quality.bound(evaluation) or MISSING,
        units.size(evaluation.size_bytes),
    )


def to_json(sweep: Sweep) -> dict[str, Any]:
    """`sweep.json`: a figure that is not finite is null. `front` and `best` are numbers of jobs."""
    plain: dict[str, Any] = finite(
        {
            "sweep": sweep.name,
            "experiment": sweep.experiment,
            "command": sweep.command,
            "optimize": sweep.optimize,
            "total": sweep.total,
            "front": list(sweep.front),
            "best": sweep.chosen.number if sweep.chosen is not None else None,
            "failed": [job.number for job in sweep.failed],
            "seconds": sum(job.seconds for job in sweep.jobs),
            "notes": list(sweep.notes),
            "jobs": [_job_json(sweep, job) for job in sweep.jobs],
        }
    )
    return plain


def _job_json(sweep: Sweep, job: Job) -> dict[str, Any]:
    trial = job.trial.to_dict() if job.trial is not None else {}
    return {
        "number": job.number,
        "choices": dict(job.choices),
        "folder": job.folder,
        "verdict": job.verdict,
        "reason": job.reason,
        "seconds": job.seconds,
        "on_front": job.number in sweep.front,
        "rebuild": job.rebuild,
        "overrides": trial.get("overrides"),
        "stages": trial.get("stages"),
        "evaluation": trial.get("evaluation"),
        "training": trial.get("training"),
    }


# The report.


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis, at this height."""

    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One of the parallel coordinates.

    Attributes:
        title: what it shows.
        hint: below the title: the section of a choice, or which values are good.
        heights: number of a job -> where its line crosses; jobs that have no value are left out.
    """

    title: str
    hint: str
    x: float
    ticks: tuple[Tick, ...]
    heights: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One job across all axes.

    Attributes:
        path: of SVG.
        heights: where it crosses each axis; empty texts where it does not.
        told: its choices and figures in one sentence.
    """

    number: int
    path: str
    verdict: str
    on_front: bool
    heights: str
    told: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job as the report's table shows it."""

    number: int
    told: str
    verdict: str
    reason: str
    rebuild: str
    figures: tuple[str, ...]
    mark: str
    link: str


def report(sweep: Sweep) -> str:
    """The whole page."""
    axes = _axes(sweep)
    # The front comes from plots.py, whose SVG writer escapes every text in it.
    return page(
        "sweep.html",
        sweep=sweep,
        claim=claim(sweep),
        tiles=_tiles(sweep),
        axes=axes,
        lines=_lines(sweep, axes),
        width=WIDTH,
        height=HEIGHT,
        top=MARGIN[0],
        bottom=HEIGHT - MARGIN[2],
        front="" if sweep.training or not sweep.measured else plots.front(sweep),
        names=head(sweep),
        rows=[_row(sweep, job) for job in sweep.ranked],
        untouched=figures(sweep, sweep.untouched) if sweep.untouched is not None else (),
        limits=_limits(sweep),
    )


def _tiles(sweep: Sweep) -> list[tuple[str, str]]:
    """Figure and what it is."""
    done = f"of {sweep.total}" if sweep.total not in (None, len(sweep.jobs)) else "jobs"
    tiles = [(str(len(sweep.jobs)), f"{done}, {_counts(sweep)}")]
    if sweep.chosen is not None and (ratio := sweep.best.speedup.get("plain" if sweep.training else "eager")):
        against = "a plain script" if sweep.training else "eager PyTorch"
        tiles.append(
            (units.ratio(ratio.value), f"job {sweep.chosen.number} vs {against}, {units.ratio_interval(ratio)}")
        )
    if sweep.measured:
        tiles.append((str(len(sweep.front)), "on the front: no other beats them in both"))
    tiles.append((units.duration(sum(job.seconds for job in sweep.jobs)), "in all jobs, what the store had is free"))
    return tiles


def _counts(sweep: Sweep) -> str:
    found = [job.verdict for job in sweep.jobs]
    return ", ".join(f"{found.count(name)} {name}" for name in ("accepted", "rejected", "failed") if name in found)


def _row(sweep: Sweep, job: Job) -> Row:
    marks = []
    if sweep.chosen is not None and job.number == sweep.chosen.number:
        marks.append("best")
    if job.number in sweep.front:
        marks.append("front")
    return Row(
        number=job.number,
        told=job.told,
        verdict=job.verdict,
        reason=job.reason,
        rebuild=job.rebuild,
        figures=figures(sweep, job.trial),
        mark=", ".join(marks),
        link=f"{job.folder}/report.html" if job.trial is not None else "",
    )


def _limits(sweep: Sweep) -> list[str]:
    told = list(sweep.notes)
    if not sweep.one_baseline:
        told.append("The jobs were measured against different untouched models: each ratio is against its own.")
    if len(sweep.measured) > 1 and not sweep.training:
        told.append(
            "Every job was certified on the same test rows. Who picks the best of many picks lucky ones, too: certify "
            "the one that you take on rows that no job has seen."
        )
    told.append(
        "The ratios hold for this machine, these threads and this batch size. Jobs that run at the same time never "
        "measure at the same time, but one may train while another measures."
    )
    return told


def _axes(sweep: Sweep) -> list[Axis]:
    """The choices, and what came of them, from left to right; better is higher up."""
    ranked = sweep.ranked
    keys = list(dict.fromkeys(key for job in sweep.jobs for key in job.choices))
    makers: list[Callable[[float], Axis | None]] = [_choice_axis(sweep, key, ranked) for key in keys]
    if sweep.training:
        makers.append(_value_axis(sweep, "rows/s", _rows_per_second, units.count, units.count, falls=False))
    else:
        goal = sweep.optimised
        makers.append(_value_axis(sweep, goal.name, _of(goal), goal.tick, goal.told, falls=goal.low_is_better))
        makers.append(_quality_axis(sweep))
        if sweep.optimize != "size":
            size = measure("size")
            makers.append(_value_axis(sweep, "size", _of(size), size.tick, size.told, falls=True))
    shown = [axis for make in makers if (axis := make(0.0)) is not None]
    _, right, _, left = MARGIN
    step = (WIDTH - left - right) / max(1, len(shown) - 1)
    return [replace(axis, x=round(left + step * place, 1)) for place, axis in enumerate(shown)]


def _choice_axis(sweep: Sweep, key: str, ranked: Sequence[Job]) -> Callable[[float], Axis | None]:
    def make(x: float) -> Axis:
        given = {job.number: job.choices[key] for job in sweep.jobs if key in job.choices}
        values = sorted(set(given.values()), key=_in_order)
        section, _, name = key.rpartition(".")
        if len(values) >= NUMBERS_FROM and all(_number(value) is not None for value in values):
            numbers = {number: _number(value) or 0.0 for number, value in given.items()}
            places = _scaled(list(numbers.values()), log=False)
            ends = (min(numbers.values()), max(numbers.values()))
            ticks = tuple(Tick(y=places(value), text=units.digits(value)) for value in ends)
            return Axis(title=name, hint=section, x=x, ticks=ticks, heights={n: places(v) for n, v in numbers.items()})
        top, bottom = MARGIN[0], HEIGHT - MARGIN[2]
        step = (bottom - top) / len(values)
        middle = {value: top + step * (place + 0.5) for place, value in enumerate(values)}
        band = min(SPREAD, 0.5 * step)
        heights = {}
        for value in values:  # lines that share a value lie beside one another, the better ones higher
            sharing = [job.number for job in ranked if given.get(job.number) == value]
            for place, number in enumerate(sharing):
                heights[number] = round(middle[value] + band * ((place + 0.5) / len(sharing) - 0.5), 1)
        ticks = tuple(Tick(y=round(middle[value], 1), text=_short(value)) for value in values)
        return Axis(title=name, hint=section, x=x, ticks=ticks, heights=heights)

    return make


def _value_axis(
    sweep: Sweep,
    title: str,
    of: Callable[[Trial], float | None],
    tick: Callable[[float], str],
    told: Callable[[float], str],
    *,
    falls: bool,
    log: bool = True,
) -> Callable[[float], Axis | None]:
    def make(x: float) -> Axis | None:
        found = {job.number: of(job.trial) for job in sweep.measured if job.trial is not None}
        values = {number: value for number, value in found.items() if value is not None and math.isfinite(value)}
        if not values:
            return None
        places = _scaled(list(values.values()), log=log, falls=falls)
        marks = _round_values(list(values.values()), log)
        text = tick if marks else told
        ticks = tuple(Tick(y=places(value), text=text(value)) for value in marks or _ends(list(values.values())))
        hint = "less is better" if falls else "more is better"
        return Axis(title=title, hint=hint, x=x, ticks=ticks, heights={n: places(v) for n, v in values.items()})

    return make


def _quality_axis(sweep: Sweep) -> Callable[[float], Axis | None]:
    judged = [each for trial in sweep.trials if trial.evaluation and (each := quality.first(trial.evaluation))]
    compared = next((each for each in judged if each.drop is not None), judged[0] if judged else None)
    falls = compared is not None and not compared.higher_is_better

    def of(trial: Trial) -> float | None:
        known = quality.first(trial.evaluation) if trial.evaluation is not None else None
        return None if known is None else known.value

    def told(value: float) -> str:
        return compared.told(value) if compared is not None else units.digits(value)

    return _value_axis(sweep, head(sweep)[2], of, told, told, falls=falls, log=False)


def _of(quantity: Measure) -> Callable[[Trial], float | None]:
    return lambda trial: None if trial.evaluation is None else quantity.of(trial.evaluation).value


def _rows_per_second(trial: Trial) -> float | None:
    return None if trial.training is None else trial.training.samples_per_second.value


def _scaled(values: Sequence[float], *, log: bool, falls: bool = False) -> Callable[[float], float]:
    """Value -> height between the ends of the axes."""
    top, bottom = MARGIN[0] + 8, HEIGHT - MARGIN[2] - 8
    grow = math.log if log and min(values) > 0 else float
    low, high = grow(min(values)), grow(max(values))

    def place(value: float) -> float:
        share = (grow(value) - low) / (high - low) if high > low else 0.5
        return round(top + (bottom - top) * (share if falls else 1 - share), 1)

    return place


def _round_values(values: Sequence[float], log: bool) -> list[float]:
    """What is marked on an axis: the round values within, if there are at least two."""
    low, high = min(values), max(values)
    if low == high:
        return []
    if log and low > 0:
        found = [
            factor * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factor in (1, 2, 5)
        ]
    else:
        step = 10.0 ** math.floor(math.log10(high - low))
        step = step / 2 if (high - low) / step < 3 else step
        first = math.ceil(low / step)
        found = [place * step for place in range(first, math.floor(high / step) + 1)]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) > 1 else []


def _ends(values: Sequence[float]) -> list[float]:
    return sorted({min(values), max(values)})


def _lines(sweep: Sweep, axes: Sequence[Axis]) -> list[Line]:
    """The front comes last, and lies on top."""
    lines = []
    for job in sweep.measured:
        known = [(axis.x, axis.heights[job.number]) for axis in axes if job.number in axis.heights]
        told = ", ".join(
            f"{name} {figure}" for name, figure in zip(head(sweep), figures(sweep, job.trial), strict=True)
        )
        line = Line(
            number=job.number,
            path="M" + " L".join(f"{x} {y}" for x, y in known),
            verdict=job.verdict,
            on_front=job.number in sweep.front,
            heights=",".join(str(axis.heights.get(job.number, "")) for axis in axes),
            told=f"{job.number}: {job.told}: {told}, {job.verdict}",
        )
        lines.append(line)
    return sorted(lines, key=lambda line: line.on_front)


def _quality(job: Job) -> float | None:
    """Of the first metric, the better the higher."""
    known = quality.first(job.trial.evaluation) if job.trial is not None and job.trial.evaluation is not None else None
    return None if known is None else known.value if known.higher_is_better else -known.value


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _ratio(interval: Interval | None) -> str:
    return MISSING if interval is None else units.ratio(interval.value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _in_order(text: str) -> tuple[int, float, str]:
    number = _number(text)
    return (1, 0.0, text) if number is None else (0, number, text)


def _short(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:16]}…"
