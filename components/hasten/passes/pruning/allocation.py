"""How many units each group keeps, so that a cost is met at the least loss of importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.passes.pruning.groups import Allocation, Ranked

BINS = 20_000
"""Into which a latency budget is divided: an option's latency is rounded up by at most a bin."""


def uniform(ranked: Sequence[Ranked], share: float, units: Mapping[str, int] | None = None) -> dict[str, int]:
    """The width of every group that is nearest to the share of its units.

    Args:
        units: of which the share is meant, where groups have lost some already.
    """
    before = units or {}
    return {each.group.name: each.group.nearest(share, before.get(each.group.name)) for each in ranked}


def cheapest(ranked: Sequence[Ranked], cost: Callable[[Allocation], float], budget: float) -> dict[str, int] | None:
    """Narrows one group after another, where it loses the least for what it saves, until the budget is met.

    What the last steps saved too much is given back where it fits. Greedy, as of a fractional knapsack.

    Returns:
        None where the narrowest widths cost more.
    """
    groups = [each.group for each in ranked]
    kept = {group.name: group.num_units for group in groups}
    steps: list[tuple[Ranked, int]] = []
    while (spent := cost(kept)) > budget:
        best: tuple[float, Ranked, int] | None = None
        for each in ranked:
            width = kept[each.group.name]
            for narrower in (other for other in reversed(each.group.widths) if other < width):
                saved = spent - cost({**kept, each.group.name: narrower})
                if saved > 0:
                    price = (each.loss(narrower) - each.loss(width)) / saved
                    best = (price, each, narrower) if best is None or price < best[0] else best
                    break
        if best is None:
            return None
        _, chosen, narrower = best
        steps.append((chosen, kept[chosen.group.name]))
        kept[chosen.group.name] = narrower
    for each, width in reversed(steps):
        wider = {**kept, each.group.name: max(width, kept[each.group.name])}
        kept = wider if cost(wider) <= budget else kept
    return kept


def knapsack(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> list[int] | None:
    """One option of each list such that the costs' sum is within the budget and the losses' sum is the least.

    Multiple-choice knapsack by dynamic programming over the budget in bins (as of HALP, Shen et al. 2022); costs are
    rounded up, so that the sum is never above the budget. Of options with equal loss the cheaper is taken.

    Args:
        losses: of the options of each list.
        costs: of the same; they may be negative.

    Returns:
        Place of the option in each list; None where the cheapest options are above the budget.
    """
    least = [float(each.min()) for each in costs]
    room = budget - sum(least)
    if room < -1e-9 * max(1.0, abs(budget)):
        return None
    bins = [_needs(each - low, room) for each, low in zip(costs, least, strict=True)]
    total = np.zeros(BINS + 1)
    choices: list[NDArray[np.intp]] = []
    for loss, need in zip(losses, bins, strict=True):
        tried = np.full((len(loss), BINS + 1), np.inf)
        for option in range(len(loss)):
            if need[option] <= BINS:
                tried[option, need[option] :] = total[: BINS + 1 - need[option]] + loss[option]
        choices.append(tried.argmin(axis=0))
        total = tried.min(axis=0)
    place, picked = int(total.argmin()), []
    for choice, need in zip(reversed(choices), reversed(bins), strict=True):
        picked.append(int(choice[place]))
        place -= int(need[picked[-1]])
    return picked[::-1]


def _needs(costs: NDArray[np.float64], room: float) -> NDArray[np.int64]:
    """Bins of the room that costs take, rounded up; one more than there are where they don't fit."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needs = np.where(costs > 0, np.ceil(costs / (max(room, 0.0) / BINS) - 1e-9), 0.0)
    return np.minimum(needs, BINS + 1).astype(np.int64)
