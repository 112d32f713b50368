"""What the width of each group changes the measured latency by, and the widths that meet a latency.

Engines run a narrower layer sometimes no faster, or slower: vector units, tiles and fused kernels want certain
multiples. So nothing is predicted from FLOPs: networks with the widths in question are timed on the target.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.core.errors import PassError
from hasten.passes.pruning.allocation import knapsack, uniform
from hasten.passes.pruning.groups import Allocation, Group, Ranked

log = logging.getLogger(__name__)

Timer = Callable[[Sequence[Allocation]], Sequence[float]]
"""Milliseconds of networks of such widths, measured together; comparable from call to call."""
Alike = Callable[[Group, Allocation], object]
"""Equal for groups whose width changes the latency of a network equally."""

NOISE = 0.02
"""Difference of two latencies, relative to the whole, that a brief measurement can't tell from none."""
SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of the units that every group keeps, at which the network is timed first."""
WIDTHS = 7
"""Widths of a group that are timed, at most, the ends and the present one among them."""
CENTRES = 2
"""Points round which a table is measured, at most ..."""
AIMS = 3
"""... and choices from each, at most."""
CLOSE = 0.05
"""Difference of prediction and measurement, relative to the latter, at which the table is believed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Groups that are alike, and what their width does to the latency.

    Attributes:
        groups: their names.
        widths: that were timed, ascending, without `slow`.
        slow: those that were slower than a wider one, by more than noise; never to be chosen.
        measured_ms: difference of the latency to that of the centre where one of the groups has this width.
        ms: the same, made to rise with the width.
    """

    groups: tuple[str, ...]
    widths: tuple[int, ...]
    slow: tuple[int, ...]
    measured_ms: tuple[float, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Differences of the latency round one point.

    Attributes:
        centre: widths of all groups from which single ones were changed.
        centre_ms: its latency.
    """

    centre: Allocation
    centre_ms: float
    rows: tuple[Row, ...]

    def predicted_ms(self, kept: Allocation) -> float:
        """The latency of widths that are in the table."""
        return self.centre_ms + sum(row.ms[row.widths.index(kept[name])] for row in self.rows for name in row.groups)

    def choose(self, ranked: Sequence[Ranked], target_ms: float) -> dict[str, int] | None:
        """The widths of least loss whose predicted latency is no more than the target; None where there are none.

        A width that is no faster than a wider one is never chosen, for it loses more.
        """
        rows = {name: row for row in self.rows for name in row.groups}
        losses = [np.array([each.loss(width) for width in rows[each.group.name].widths]) for each in ranked]
        # Backwards, so that the wider one of two equally good options comes first.
        options = knapsack(
            [loss[::-1] for loss in losses],
            [np.array(rows[each.group.name].ms[::-1]) for each in ranked],
            target_ms - self.centre_ms,
        )
        if options is None:
            return None
        return {
            each.group.name: rows[each.group.name].widths[::-1][option]
            for each, option in zip(ranked, options, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        names = ("groups", "widths", "slow", "measured_ms", "ms")
        rows = [{name: [*getattr(row, name)] for name in names} for row in self.rows]
        return {"centre": dict(self.centre), "centre_ms": self.centre_ms, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Widths that meet a latency.

    Attributes:
        target_ms: that was asked for.
        predicted_ms: by the last table, scaled to what was measured of its earlier choices.
        measured_ms: of the network with these widths.
        curve: share of the units that all groups keep, 0 for the narrowest widths -> milliseconds.
        tables: in the order in which they were measured.
    """

    kept: Allocation
    target_ms: float
    predicted_ms: float
    measured_ms: float
    curve: Mapping[float, float]
    tables: tuple[Table, ...]

    @property
    def miss(self) -> float:
        """Difference of prediction and measurement, relative to the latter."""
        return abs(self.predicted_ms - self.measured_ms) / self.measured_ms

    @property
    def meets(self) -> bool:
        """Whether the latency is as low as was asked for."""
        return self.measured_ms <= self.target_ms * (1 + NOISE)

    @property
    def holds(self) -> bool:
        """Whether it is, and was foreseen."""
        return self.meets and self.miss <= CLOSE


def meet(ranked: Sequence[Ranked], target_ms: float, timer: Timer, alike: Alike) -> Meeting:
    """Widths of least loss that meet the latency: a uniform point near it, a table round it, and a choice from that.

    What was chosen is timed. Where it is above the target, or far from its prediction, the table is scaled to what was
    measured, and at last measured again round what it chose, because what a width is worth depends on those of its
    neighbours.

    Raises:
        PassError: no widths meet the latency.
    """
    curve = _uniform_curve(ranked, timer)
    centre: Allocation = _uniform_point(ranked, curve, target_ms)
    tables: list[Table] = []
    tried: list[Meeting] = []
    for _ in range(CENTRES):
        tables.append(_measured(ranked, centre, timer, alike))
        tried += _choices(ranked, target_ms, timer, curve, tables)
        if not tried or tried[-1].holds:
            break
        centre = tried[-1].kept
    if not tried:
        raise _too_slow(target_ms, min(*curve.values(), *(_fastest_ms(table) for table in tables)))
    met = [each for each in tried if each.meets]
    held = [each for each in met if each.holds]
    if held:
        return min(held, key=lambda each: _loss(ranked, each.kept))
    return min(met, key=lambda each: each.miss) if met else min(tried, key=lambda each: each.measured_ms)


def _choices(
    ranked: Sequence[Ranked], target_ms: float, timer: Timer, curve: Mapping[float, float], tables: Sequence[Table]
) -> list[Meeting]:
    """What the last table chooses, timed; and again with the table scaled to what was measured, until it holds."""
    tried: list[Meeting] = []
    scale = 1.0
    for _ in range(AIMS):
        chosen = tables[-1].choose(ranked, target_ms / scale)
        if chosen is None or any(chosen == each.kept for each in tried):
            break
        predicted = scale * tables[-1].predicted_ms(chosen)
        (measured,) = timer([chosen])
        log.info("predicted %.4g ms from the latency table, measured %.4g ms", predicted, measured)
        tried.append(
            Meeting(
                kept=chosen,
                target_ms=target_ms,
                predicted_ms=predicted,
                measured_ms=measured,
                curve=curve,
                tables=tuple(tables),
            )
        )
        if tried[-1].holds:
            break
        scale *= measured / predicted
    return tried


def rising(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The nearest values, in least squares, that never go down (isotonic regression)."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression().fit_transform(np.arange(len(values)), np.asarray(values), sample_weight=weights)
    return [float(value) for value in fitted]


def timed_widths(group: Group, centre: int) -> tuple[int, ...]:
    """At most `WIDTHS` of the group's widths: the ends, the present one, and multiples of a round number.

    What suits vector units and tiles are multiples of powers of two, and between two of them a width may well be slower
    than the wider one.
    """
    if len(group.widths) <= WIDTHS:
        return group.widths
    step = group.multiple
    while len(aligned := [width for width in group.widths if width % step == 0]) > WIDTHS - 3:
        step *= 2
    return tuple(sorted({group.widths[0], *aligned, centre, group.num_units}))


def _uniform_curve(ranked: Sequence[Ranked], timer: Timer) -> dict[float, float]:
    shares = (0.0, *sorted(SHARES), 1.0)
    return dict(zip(shares, timer([uniform(ranked, share) for share in shares]), strict=True))


def _uniform_point(ranked: Sequence[Ranked], curve: Mapping[float, float], target_ms: float) -> dict[str, int]:
    """The widest uniform widths whose latency is no more than the target, between the timed ones; else the fastest."""
    shares, latencies = [*curve], [*curve.values()]
    met = [place for place, latency in enumerate(latencies) if latency <= target_ms]
    if not met:  # the narrowest need not be the fastest, and other widths may do what equal ones don't
        return uniform(ranked, shares[latencies.index(min(latencies))])
    last = met[-1]
    if last == len(shares) - 1:
        return uniform(ranked, shares[last])
    between = (target_ms - latencies[last]) / (latencies[last + 1] - latencies[last])
    return uniform(ranked, shares[last] + between * (shares[last + 1] - shares[last]))


def _measured(ranked: Sequence[Ranked], centre: Allocation, timer: Timer, alike: Alike) -> Table:
    """Times, for each kind of group, networks in which all groups of this kind have another width.

    All at once, because the difference of one of many is below what can be measured.
    """
    kinds: dict[object, list[Ranked]] = {}
    for each in ranked:
        kinds.setdefault((each.group.widths, alike(each.group, centre)), []).append(each)
    plans: list[tuple[list[Ranked], int]] = []
    for members in kinds.values():
        group = members[0].group
        present = centre[group.name]
        plans += [(members, width) for width in timed_widths(group, present) if width != present]
    changed = [{**centre, **{each.group.name: width for each in members}} for members, width in plans]
    centre_ms, *latencies = timer([centre, *changed])
    rows = []
    for members in kinds.values():
        own = {width: ms for (others, width), ms in zip(plans, latencies, strict=True) if others is members}
        rows.append(_row(members, {centre[members[0].group.name]: centre_ms, **own}, centre_ms))
    return Table(centre=dict(centre), centre_ms=centre_ms, rows=tuple(rows))


def _row(members: Sequence[Ranked], latencies: Mapping[int, float], centre_ms: float) -> Row:
    kept: list[int] = []
    for width in sorted(latencies, reverse=True):
        if all(latencies[width] <= latencies[wider] + NOISE * centre_ms for wider in kept):
            kept.append(width)
    widths = tuple(sorted(kept))
    measured = [(latencies[width] - centre_ms) / len(members) for width in widths]
    return Row(
        groups=tuple(each.group.name for each in members),
        widths=widths,
        slow=tuple(sorted(latencies.keys() - set(widths))),
        measured_ms=tuple(measured),
        ms=tuple(rising(measured)),
    )


def _fastest_ms(table: Table) -> float:
    return table.centre_ms + sum(row.ms[0] * len(row.groups) for row in table.rows)


def _loss(ranked: Sequence[Ranked], kept: Allocation) -> float:
    return sum(each.loss(kept[each.group.name]) for each in ranked)


def _too_slow(target_ms: float, reached_ms: float) -> PassError:
    return PassError(
        f"{target_ms:.3g} ms can't be met by pruning: the fastest widths take {reached_ms:.3g} ms on the target; "
        f"lower pruning.latency_cut, or pruning.round_to"
    )
