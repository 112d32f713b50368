"""The largest value of a knob that still holds the constraints, by bisection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError

STEPS_PER_UNIT = 100
"""Values are whole hundredths: a recipe is compared by its spelling, and nobody reads a sparsity of 0.43749999."""


@dataclass(frozen=True, kw_only=True)
class _Range:
    """In hundredths."""

    low: int
    high: int
    tolerance: int

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> _Range:
        try:
            low, high, tolerance = (float(search[name]) for name in ("low", "high", "tolerance"))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"search must spell numbers for low, high and tolerance, got {dict(search)}") from error
        if not all(map(math.isfinite, (low, high, tolerance))):
            raise ConfigError(f"search must spell finite numbers for low, high and tolerance, got {dict(search)}")
        lowest, highest = math.ceil(round(low * STEPS_PER_UNIT, 6)), math.floor(round(high * STEPS_PER_UNIT, 6))
        if lowest > highest or tolerance <= 0:
            raise ConfigError(
                f"search needs low <= high in whole hundredths and a tolerance above 0, got {dict(search)}"
            )
        return cls(low=lowest, high=highest, tolerance=max(1, math.floor(round(tolerance * STEPS_PER_UNIT, 6))))


def next_value(search: Mapping[str, Any], observations: Sequence[tuple[float, bool]]) -> float | None:
    """What to try next: `low`, then `high`, then halfway between the largest admissible and the smallest refused.

    Nothing below `low` is tried: where `low` is refused the search is over, as the knob is of no use to this recipe.

    Args:
        search: `low` (first value), `high` (never beyond) and `tolerance` (largest gap to be left).
        observations: value and whether it held the constraints, in any order.

    Returns:
        A value in whole hundredths that has not been observed, or None when nothing is left to try.

    Raises:
        ConfigError: the range is empty, or a number is missing.
    """
    bounds = _Range.of(search)
    seen = {round(value * STEPS_PER_UNIT): admissible for value, admissible in observations}
    for value in (bounds.low, bounds.high):
        if value not in seen:
            return value / STEPS_PER_UNIT
        if value == bounds.low and not seen[value]:
            return None
    held = max(value for value, admissible in seen.items() if admissible)
    refused = [value for value, admissible in seen.items() if not admissible and value > held]
    if not refused or min(refused) - held <= bounds.tolerance:
        return None
    return (held + min(refused)) // 2 / STEPS_PER_UNIT


def max_values(search: Mapping[str, Any]) -> int:
    """How many values `next_value` asks for at most."""
    bounds = _Range.of(search)
    gap = bounds.high - bounds.low
    if gap == 0:
        return 1
    steps = 2
    while gap > bounds.tolerance:
        gap = (gap + 1) // 2
        steps += 1
    return steps
