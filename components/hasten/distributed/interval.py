"""How often a training that may fail is worth a checkpoint."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_LOOK = 5
"""Steps after which it is known how long they take."""
REMEMBERED = 9
"""Checkpoints whose cost counts: that of the first, when all is cold, is soon one of many."""


def daly_seconds(cost_seconds: float, mtbf_seconds: float) -> float:
    """Work between two checkpoints that loses least to them and to failures.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", equation 37; its first
    term is that of Young 1974, sqrt(2 C M).

    Args:
        cost_seconds: C, for which a checkpoint holds the training up.
        mtbf_seconds: M, the mean time between failures.
    """
    if cost_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    share = cost_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * cost_seconds * mtbf_seconds) * (1 + math.sqrt(share) / 3 + share / 9) - cost_seconds


@dataclass(kw_only=True)
class Interval:
    """When the next checkpoint is due, in steps, so that processes with other clocks can go by it.

    Args:
        seconds: between two checkpoints, where no failures are expected.
        mtbf_seconds: mean time between failures, from which and from what checkpoints cost the interval is chosen; the
            first checkpoint is written at once to see what it costs. None where `seconds` holds.
        clock: gives seconds.
    """

    seconds: float
    mtbf_seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    safe_seconds: float = 0.0
    """That the last checkpoint took to be safe, before which no other is begun."""
    _costs: list[float] = field(default_factory=list)
    _at: float = 0.0
    _step: int = 0

    @property
    def cost_seconds(self) -> float | None:
        """For which a checkpoint holds the training up, the median of the latest; None before the first."""
        return statistics.median(self._costs) if self._costs else None

    @property
    def wanted_seconds(self) -> float:
        """Between two checkpoints."""
        if self.mtbf_seconds is None:
            return self.seconds
        if self.cost_seconds is None:
            return 0.0
        return max(daly_seconds(self.cost_seconds, self.mtbf_seconds), self.safe_seconds)

    @property
    def told(self) -> str:
        """What was chosen and what it means, a sentence; empty where nothing was chosen."""
        if self.mtbf_seconds is None or self.cost_seconds is None:
            return ""
        wanted, hours = self.wanted_seconds, self.mtbf_seconds / 3600
        share = self.cost_seconds / (wanted + self.cost_seconds)
        return (
            f"A checkpoint every {wanted:.3g} s, chosen for one failure in {hours:g} h (distributed.mtbf_hours; Daly "
            f"2006), held the training up for {1000 * self.cost_seconds:.3g} ms ({share:.2%} of the time) and was safe "
            f"after {self.safe_seconds:.3g} s: a failure is expected to cost the work of "
            f"{wanted / 2 + self.safe_seconds:.3g} s"
        )

    def start(self, step: int) -> int:
        """The training goes on from this step; gives the step at which to look whether a checkpoint is due."""
        self._at, self._step = self.clock(), step
        return step + FIRST_LOOK

    def look(self, step: int, *, busy: bool) -> tuple[bool, int]:
        """Whether a checkpoint is due now, and else the step at which to look again.

        It is looked several times, the nearer the more often, for steps may become slower.

        Args:
            busy: the checkpoint before is not safe yet.
        """
        passed, wanted = self.clock() - self._at, self.wanted_seconds
        if passed >= wanted and not busy:
            return True, step
        left, soon = wanted - passed, wanted / 8
        wait = left / 2 if left > soon else left if left > 0 else soon
        return False, step + self._steps(wait, passed / (step - self._step))

    def written(self, step: int, cost_seconds: float) -> int:
        """A checkpoint was begun at this step; gives the step at which to look whether the next is due."""
        step_seconds = (self.clock() - cost_seconds - self._at) / (step - self._step)
        self._costs = [*self._costs, cost_seconds][-REMEMBERED:]
        self._at, self._step = self.clock(), step
        return step + self._steps(self.wanted_seconds / 2, step_seconds)

    @staticmethod
    def _steps(seconds: float, step_seconds: float) -> int:
        return max(1, math.ceil(seconds / step_seconds)) if step_seconds > 0 else 1
