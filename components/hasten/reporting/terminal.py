"""What a person sees while hasten works, and at the end of it."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hasten.core.store import Listing
from hasten.core.trial import (
    Collective,
    Interval,
    OperatorGroup,
    Profile,
    RequestLatency,
    Result,
    StepProfile,
    TrainingResult,
    Trial,
)
from hasten.distributed.layouts import Weighed
from hasten.reporting import quality, training, units
from hasten.reporting import sweep as swept
from hasten.reporting.summary import addressed, claim, shares_told, tried
from hasten.reporting.sweep import Sweep

STATE_STYLES = {"ok": "green", "missing": "yellow", "fails": "red"}
VERDICT_STYLES = {"accepted": "green", "rejected": "yellow", "failed": "red"}
REDRAW_SECONDS = 0.2
KEY_CHARACTERS = 12
FIGURE_WIDTHS = (20, 5, 5, 7, 7, 7)
"""Columns right of what was tried: latency, both speed-ups, quality, bound of its drop, size."""
TRAINING_WIDTHS = (8, 8, 8, 8, 10)
"""The same of a training: rows per second, both speed-ups, memory, time before its first step is done."""
SWEPT_WIDTHS = (21, 8, 8, 7, 10)
"""Of a sweep: latency, speed-up, quality, size, verdict with the mark of the front."""
SWEPT_TRAINING_WIDTHS = (8, 8, 8, 10)
UNKNOWN = "unknown"
"""Quality that nothing has checked, in a narrow column."""


class Finding(NamedTuple):
    """One line of a check-up: what was looked at, how it is (`ok`, `missing` or `fails`), and what to know of it."""

    name: str
    state: Literal["ok", "missing", "fails"]
    told: str


class Screen:
    """A live table with progress below it on a terminal; plain lines elsewhere, and the table at the end.

    It is a `core.interfaces.Progress`. Nothing redraws in the background: a thread that wakes up while a latency is
    measured would be measured too.

    Args:
        console: where to; standard output by default, without colours where `NO_COLOR` is set.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _standard_output()
        self._trials: dict[int, Trial] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
        )
        self._tasks: list[TaskID] = []
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Screen:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._trials:
            self._console.print(_trial_table(tuple(self._trials.values()), self._console.width))

    def start(self, what: str, total: int) -> None:
        """Shows a bar for work of so many steps, below those that are under way."""
        self._tasks.append(self._progress.add_task(what, total=total))
        self._draw()

    def advance(self, steps: int = 1) -> None:
        if self._tasks:
            self._progress.advance(self._tasks[-1], steps)
            if time.monotonic() - self._drawn > REDRAW_SECONDS:
                self._draw()

    def stop(self) -> None:
        """Takes away the bar that was started last."""
        if self._tasks:
            self._progress.remove_task(self._tasks.pop())
            self._draw()

    def trial(self, trial: Trial) -> None:
        """Adds an iteration that has its verdict."""
        self._trials[trial.number] = trial
        if self._live is None:
            self._line(_trial_line(trial, self._trials))
        self._draw()

    def estimate(self, rows: Sequence[tuple[str, int, float]], total_seconds: float) -> None:
        """What the loop may cost.

        Args:
            rows: strategy, attempts that it may make, expected seconds of them all.
            total_seconds: expected for everything, the baseline included.
        """
        table = _table("strategy", ">attempts", ">expected")
        for strategy, attempts, seconds in rows:
            table.add_row(escape(strategy), str(attempts), units.duration(seconds))
        table.add_section()
        table.add_row("at most, with the baseline", "", units.duration(total_seconds))
        self._console.print(table)

    def stages(self, rows: Sequence[tuple[str, str, bool, float | None]], title: str = "") -> None:
        """What a dry run found.

        Args:
            rows: stage, key, whether the store has it, recorded or expected seconds (None where nothing is known).
            title: of the recipe that the stages belong to.
        """
        if title:
            self._console.print(Text(title, "bold"))
        table = _table("stage", "key", "state", ">seconds")
        for stage, key, present, seconds in rows:
            state = "[green]in the store[/]" if present else "to be built"
            cost = "unknown" if seconds is None else units.duration(seconds)
            table.add_row(escape(stage), key[:KEY_CHARACTERS], state, cost)
        self._console.print(table)

    def layouts(self, rows: Sequence[Weighed], notes: Sequence[str]) -> None:
        """What `distributed=auto` was chosen from: the first row is taken.

        Args:
            notes: how it was weighed, one sentence each.
        """
        table = _table("distributed=auto", ">MB a process", ">ms a step", ">sending", ">idle", "")
        weighed = [row for row in rows if row.parts_ms is not None]
        for place, row in enumerate(weighed):
            parts = row.parts_ms or {}
            figures = (row.step_ms or 0.0, parts["communication"], parts["waiting"])
            state = Text("too large", "yellow") if row.refused else Text("" if place else "taken", "green")
            memory = f"{(row.process_bytes or 0.0) / 1e6:.0f}"
            table.add_row(escape(row.layout), memory, *(f"{figure:.1f}" for figure in figures), state)
        self._console.print(table)
        for row in rows:
            if row.refused:
                self._line(f"not {row.layout}: {row.refused}")
        for note in notes:
            self._line(note)

    def store(self, rows: Sequence[Listing]) -> None:
        """What is in the store, newest first, with what is wrong with it."""
        table = _table("stage", "key", ">size", ">age", ">cost", "state")
        now = time.time()
        for row in sorted(rows, key=lambda listing: -listing.created):
            style = "green" if row.state == "finished" else "yellow" if row.state == "unfinished" else "red"
            state = Text(row.state, style) + Text(f": {row.problem}" if row.problem else "")
            age = units.duration(max(0.0, now - row.created))
            figures = (units.size(row.num_bytes), age, units.duration(row.seconds))
            table.add_row(escape(row.stage), row.key[:KEY_CHARACTERS], *figures, state)
        self._console.print(table)
        self._line(f"{len(rows)} stages, {units.size(sum(row.num_bytes for row in rows))}")

    def findings(self, title: str, findings: Sequence[Finding]) -> None:
        """What a check-up found, one line each, folded and never cut."""
        self._console.print(Text(title, "bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        for width in (16, 8, None):
            table.add_column(width=width, overflow="fold")
        for finding in findings:
            state = Text(finding.state, STATE_STYLES[finding.state])
            table.add_row(Text(f"  {finding.name}"), state, Text(finding.told))
        self._console.print(table)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A titled table of texts, folded and never cut; the first column is not even folded."""
        table = _table(*columns)
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(Text(title, "bold"))
        self._console.print(Padding(table, (0, 0, 1, 2)))

    def lines(self, lines: Iterable[str]) -> None:
        """Sentences, each from the start of a line."""
        for line in lines:
            self._console.print(Text(line))
        self._console.print()

    def profile(self, profile: Profile, title: str) -> None:
        """Where a request's time goes, each kind of operators against the roofline, and the bottleneck that follows."""
        self._console.print(Text.assemble((title, "bold"), f": {units.latency(profile.latency_ms)} per request"))
        self._operators(profile.operators)
        told = {kind: share for kind, share in profile.shares.items() if kind != "capacity" or share > 0}
        self._bottleneck(profile.bottleneck, told, profile.evidence)

    def step_profile(self, profile: StepProfile, title: str) -> None:
        """Where a training step's time goes, and the bottleneck that follows."""
        self._console.print(Text.assemble((title, "bold"), f": {units.latency(profile.step_ms)} per training step"))
        table = _table("part of a step", ">share", ">time")
        for name, milliseconds in profile.parts_ms.items():
            table.add_row(name, f"{milliseconds / profile.step_ms:.0%}", units.latency(milliseconds))
        self._console.print(table)
        if profile.collectives:
            self._collectives(profile.collectives)
        if profile.operators:
            self._operators(profile.operators)
        told = {kind: share for kind, share in profile.shares.items() if share >= 0.005}
        self._bottleneck(profile.bottleneck, told, profile.evidence)

    def summary(self, result: Result | TrainingResult) -> None:
        """What a run ends with. Commands stand below the panel, each whole on one line, to be copied."""
        if isinstance(result, TrainingResult):
            self._training_summary(result)
            return
        style = "green" if result.certificate.held and result.best.number != result.baseline.number else "yellow"
        self._console.print(Panel(Group(*_summary_lines(result)), title=escape(result.experiment), border_style=style))
        for warning in result.warnings:
            self._console.print(Text(f"warning: {warning}", "yellow"))
        self._line(f"model      {result.model_folder}")
        self._line(f"rebuild    {result.best.rebuild}")
        if result.tracking_command is not None:
            self._line(f"look       {result.tracking_command}")

    def sweep(self, sweep: Sweep) -> None:
        """All jobs of a sweep, the best first, with the front marked; what failed, and why."""
        self._console.print(Text(swept.claim(sweep), "bold"))
        self._console.print(_sweep_table(sweep, self._console.width))
        if sweep.front:
            self._line("* on the front: no other is better both in what is optimised and in quality")
        if sweep.failed:
            self._line(f"{len(sweep.failed)} failed; the same command with sweep.again=failed runs only them again:")
        for job in sweep.failed:
            self._line(f"  {job.number} {job.told}: {job.reason}")

    def _training_summary(self, result: TrainingResult) -> None:
        style = "green" if result.best.number != result.baseline.number else "yellow"
        told = Group(Text(training.claim(result), "bold"), Text(), _facts(training.facts(result)))
        self._console.print(Panel(told, title=escape(result.experiment), border_style=style))
        for warning in result.warnings:
            self._console.print(Text(f"warning: {warning}", "yellow"))
        self._line(f"run        {result.command}")
        self._line(f"rebuild    {result.best.rebuild}")
        if result.tracking_command is not None:
            self._line(f"look       {result.tracking_command}")

    def _collectives(self, collectives: Sequence[Collective]) -> None:
        """What the processes of a training tell one another in a step."""
        table = _table("collectives", ">calls", ">bytes", ">time", ">waited for", ">beside calculation")
        for each in collectives:
            times = (units.latency(each.milliseconds), units.latency(each.waited_ms))
            table.add_row(each.kind, f"{each.calls:.3g}", units.size(each.num_bytes), *times, f"{each.hidden:.0%}")
        self._console.print(table)

    def _operators(self, operators: Sequence[OperatorGroup]) -> None:
        """Each kind of operators against the roofline."""
        table = _table("operators", ">calls", ">share", ">time", "bound by", ">achieved of possible", ">headroom")
        for row in sorted(operators, key=lambda group: -group.milliseconds):
            figures = (str(row.calls), f"{row.share:.0%}", units.latency(row.milliseconds), row.bound)
            table.add_row(escape(row.kind), *figures, *units.reached(row))
        self._console.print(table)

    def _bottleneck(self, name: str, shares: Mapping[str, float], evidence: Iterable[str]) -> None:
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        self._console.print(Text.assemble("bottleneck: ", (name, "bold"), f" ({told})"))
        for sentence in evidence:
            self._console.print(Padding(Text(sentence), (0, 0, 0, 2)))

    def _line(self, text: str) -> None:
        """One line however long it is, as it stands."""
        self._console.print(Text(text), soft_wrap=True)

    def _draw(self) -> None:
        if self._live is None:
            return
        self._drawn = time.monotonic()
        below: list[RenderableType] = [self._progress] if self._tasks else []
        self._live.update(Group(*self._fitting(len(self._tasks) + 1), *below), refresh=True)

    def _fitting(self, reserved: int) -> list[RenderableType]:
        """The table of as many of the latest trials as leave so many lines of the window."""
        trials = tuple(self._trials.values())
        for first in range(len(trials)):
            table = _trial_table(trials, self._console.width, first)
            if len(self._console.render_lines(table, pad=False)) + reserved <= self._console.height:
                return [table]
        return []


def _standard_output() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal without UTF-8 gets a question mark instead of an exception
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


def _table(*columns: str) -> Table:
    """A table without frames; a column that starts with `>` is aligned to the right and never cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _trial_table(trials: Sequence[Trial], width: int, first: int = 0) -> RenderableType:
    """Two lines a trial: its figures, and its verdict with the reason. No figure is cut at 80 columns.

    Args:
        trials: the whole history.
        width: columns of the terminal.
        first: position of the first trial that is shown.
    """
    if trials[0].training is not None:
        return _training_table(trials, width, first)
    by_number = {trial.number: trial for trial in trials}
    evaluated = [trial.evaluation for trial in trials if trial.evaluation is not None]
    metric = evaluated[0].metric if evaluated else "quality"
    head = (
        "#",
        "tried",
        "latency p50",
        "vs\neager",
        "vs\nbest",
        metric if len(metric) <= 7 else "quality",
        f"drop <=\n{quality.bound_unit(trials)}".strip(),
    )
    lines: list[RenderableType] = [_figures(width, [Text(cell, "bold") for cell in (*head, "size")])]
    for trial in trials[first:]:
        lines.append(_figures(width, _cells(trial, _tried_width(width))))
        for other in quality.others(trial.evaluation) if trial.evaluation is not None else ():
            lines.append(Padding(Text(quality.sentence(other)), (0, 0, 0, 3)))
        bottleneck = f" ({addressed(trial, by_number)})" if trial.number else ""
        style = VERDICT_STYLES[trial.verdict]
        lines.append(Padding(Text.assemble((trial.verdict, style), f"{bottleneck}: {trial.reason}"), (0, 0, 0, 3)))
        notes = trial.evaluation.notes if trial.evaluation is not None else ()
        lines += [Padding(Text(f"note: {note}", "dim"), (0, 0, 0, 3)) for note in notes]
    return Group(*lines)


def _training_table(trials: Sequence[Trial], width: int, first: int) -> RenderableType:
    """As `_trial_table`, of trials whose training was measured."""
    by_number = {trial.number: trial for trial in trials}
    head = ("#", "tried", "rows/s", "vs plain", "vs best", "memory", "start")
    lines: list[RenderableType] = [_figures(width, [Text(cell, "bold") for cell in head], TRAINING_WIDTHS)]
    for trial in trials[first:]:
        row = training.table_row(trial, by_number)
        style = "bold" if trial.verdict == "accepted" else ""
        what = "\n".join(_folded(override, _tried_width(width, TRAINING_WIDTHS)) for override in row.tried.split())
        found = trial.training
        rows = "–" if found is None else units.count(found.samples_per_second.value)
        ratios = [_ratio(trial.speedup.get(name)) for name in ("plain", "previous")]
        cells = [Text(row.number), Text(what, style), *map(Text, (rows, *ratios, row.memory, row.start))]
        lines.append(_figures(width, cells, TRAINING_WIDTHS))
        bottleneck = f" ({row.bottleneck})" if trial.number else ""
        told = Text.assemble((trial.verdict, VERDICT_STYLES[trial.verdict]), f"{bottleneck}: {trial.reason}")
        lines.append(Padding(told, (0, 0, 0, 3)))
        lines += [Padding(Text(f"note: {note}", "dim"), (0, 0, 0, 3)) for note in row.notes]
    return Group(*lines)


def _sweep_table(sweep: Sweep, width: int) -> RenderableType:
    """One line a job with a column for each choice; where that has no room, its choices stand below its figures.

    No figure is cut at 80 columns.
    """
    widths = SWEPT_TRAINING_WIDTHS if sweep.training else SWEPT_WIDTHS
    names = swept.head(sweep)
    shown = [place for place, name in enumerate(names) if not name.startswith("drop")]
    head = [names[place] if len(names[place]) <= 8 or place == 0 else "quality" for place in shown]
    keys = list(dict.fromkeys(key for job in sweep.jobs for key in job.choices))
    titles = [key.rpartition(".")[2] for key in keys]
    values = [[job.choices.get(key, "") for key in keys] for job in sweep.ranked]
    needed = [max(map(len, column)) for column in zip(titles, *values, strict=True)]
    beside = sum(needed) + len(needed) + sum(widths) + len(widths) + 3 <= width
    columns = [*needed, *widths] if beside else widths
    named = ("#", *(titles if beside else ()), *head, "verdict")
    lines: list[RenderableType] = [_swept_line([Text(cell, "bold") for cell in named], columns)]
    for job, chosen in zip(sweep.ranked, values, strict=True):
        front, figures = job.number in sweep.front, swept.figures(sweep, job.trial)
        style = "bold" if front else ""
        verdict = Text(f"{job.verdict}{' *' if front else ''}", VERDICT_STYLES.get(job.verdict, ""))
        choices = [Text(value, style) for value in chosen] if beside else []
        cells = [Text(str(job.number)), *choices, *(Text(figures[at]) for at in shown), verdict]
        lines.append(_swept_line(cells, columns))
        if not beside:
            lines.append(Padding(Text(" ".join(job.short), style), (0, 0, 0, 4)))
    return Group(*lines)


def _swept_line(cells: Sequence[Text], widths: Sequence[int]) -> Table:
    line = Table.grid(padding=(0, 1, 0, 0), expand=False)
    line.add_column(width=3, justify="right")
    for width in widths:
        line.add_column(width=width, no_wrap=True)
    line.add_row(*cells)
    return line


def _figures(width: int, cells: Iterable[Text], figure_widths: Sequence[int] = FIGURE_WIDTHS) -> Table:
    line = Table.grid(padding=(0, 1, 0, 0), expand=False)
    line.add_column(width=2, justify="right")
    line.add_column(width=_tried_width(width, figure_widths), overflow="fold")
    for figure_width in figure_widths:
        line.add_column(width=figure_width, justify="right", vertical="top")
    line.add_row(*cells)
    return line


def _tried_width(width: int, figure_widths: Sequence[int] = FIGURE_WIDTHS) -> int:
    figures = sum(figure_widths) + len(figure_widths)
    return max(12, min(44, width - figures - 4))


def _folded(override: str, width: int) -> str:
    """Breaks after the `=` what does not fit on one line, instead of within a word."""
    key, equals, value = override.partition("=")
    return override if len(override) <= width else f"{key}{equals}\n{value}"


def _cells(trial: Trial, tried_width: int) -> list[Text]:
    overrides = "\n".join(_folded(override, tried_width) for override in tried(trial).split())
    what = [Text(str(trial.number)), Text(overrides, "bold" if trial.verdict == "accepted" else "")]
    evaluation = trial.evaluation
    if evaluation is None:
        return [*what, *(Text("-") for _ in FIGURE_WIDTHS)]
    known = quality.first(evaluation)
    figures = (
        "emulated" if evaluation.emulated else units.latency_interval(evaluation.latency_ms["p50"]),
        _ratio(evaluation.speedup.get("eager")),
        _ratio(evaluation.speedup.get("previous")),
        UNKNOWN if known is None else known.told(),
        quality.bound(evaluation) or "-",
        units.size(evaluation.size_bytes),
    )
    return [*what, *(Text(figure) for figure in figures)]


def _ratio(interval: Interval | None) -> str:
    return "-" if interval is None else units.ratio(interval.value)


def _trial_line(trial: Trial, trials: dict[int, Trial]) -> str:
    """One trial on one line, for logs."""
    parts = [f"trial {trial.number:02d} {tried(trial)}: {trial.verdict}"]
    if trial.number:
        parts.append(f"bottleneck {addressed(trial, trials)}")
    if trial.evaluation is not None:
        evaluation = trial.evaluation
        latency = units.latency_interval(evaluation.latency_ms["p50"])
        parts.append("emulated" if evaluation.emulated else f"p50 {latency}")
        names = (("eager", "eager"), ("previous", "best"))
        parts += [f"{_ratio(evaluation.speedup[key])} vs {name}" for key, name in names if key in evaluation.speedup]
        if (known := quality.first(evaluation)) is None:
            parts.append("quality unchecked")
        else:
            bound = "" if known.drop is None else f" (drop <= {known.drop.told(known.drop.bound)})"
            parts.append(f"{evaluation.metric} {known.told()}{bound}")
        parts += [f"{other.name} {other.after} (drop <= {other.bound})" for other in quality.others(evaluation)]
        parts.append(units.size(evaluation.size_bytes))
    if trial.training is not None:
        parts.append(f"{training.rate(trial.training)} rows/s")
        parts += [f"{_ratio(ratio)} vs {name}" for name, ratio in trial.training.speedup.items()]
    return f"{', '.join(parts)}; {trial.reason}"


def _request(request: RequestLatency, engine: str) -> str:
    """`1.80 ms -> 412 µs, 4.37x vs eager PyTorch, 1.50x vs untouched, onnxruntime`."""
    after, start = request.latency_ms["p50"], request.references_ms.get("eager")
    parts = [" -> ".join(units.latency(each.value) for each in (start, after) if each is not None)]
    for reference, meaning in (("eager", "eager PyTorch"), ("engine", f"untouched, {engine}")):
        if reference in request.speedup:
            parts.append(f"{units.ratio_interval(request.speedup[reference])} vs {meaning}")
    return ", ".join(parts)


def _summary_lines(result: Result) -> list[RenderableType]:
    certificate = result.certificate
    lines: list[RenderableType] = [Text(claim(result), "bold"), Text()]
    facts: list[tuple[str, str]] = []
    for reference, meaning in (("eager", "eager PyTorch"), ("engine", f"untouched, {result.engine_reference}")):
        if reference in result.speedup:
            facts.append((f"vs {meaning}", units.ratio_interval(result.speedup[reference])))
    if told := shares_told(result):
        facts.append(("step by step", told))
    before, after = result.baseline.evaluation, result.best.evaluation
    if before is not None and after is not None:
        # The baseline's latency of the session in which the best was measured, so that the two belong together.
        start = after.references_ms.get("eager", before.latency_ms["p50"])
        latencies = (units.latency(each.value) for each in (start, after.latency_ms["p50"]))
        facts.append(("latency p50", "emulated" if after.emulated else " -> ".join(latencies)))
        facts += [(f"p50 of {each.told}", _request(each, result.engine_reference)) for each in result.requests]
        facts.append(("size", f"{units.size(before.size_bytes)} -> {units.size(after.size_bytes)}"))
        facts.append(("memory", f"{units.size(before.memory_bytes)} -> {units.size(after.memory_bytes)}"))
        if result.optimize == "throughput":
            facts.append(("rows/s", f"{units.count(before.throughput.value)} -> {units.count(after.throughput.value)}"))
    for each in quality.certified(certificate):
        limit = f", allowed {each.allowed}" if each.constrained else ""
        facts.append((f"{each.name} (test)", f"{each.before} -> {each.after}, drop at most {each.bound}{limit}"))
    if not certificate.checked:
        facts.append(("quality", quality.UNCHECKED))
    facts.append(("stopped", result.stopped))
    if result.binding is not None:
        facts.append(("binding", result.binding))
    return [*lines, _facts(facts), Text(), Text(certificate.statement)]


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts:
        grid.add_row(Text(name), Text(text))
    return grid
