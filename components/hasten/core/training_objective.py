"""What counts as a better training, and what it must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Lt

from hasten.core.objective import Judgement
from hasten.core.trial import Interval as Ratio
from hasten.core.trial import TrainingEvaluation


@dataclass(frozen=True, kw_only=True)
class TrainingObjective:
    """The most training rows per second at equal loss.

    Attributes:
        confidence: of the intervals, two-sided; and that a training which learns as the baseline does is not rejected.
        goal_speedup: stop as soon as the lower end of the speed-up against the baseline reaches it; None to go on.
        min_gain: smallest gain in rows per second that is worth a more complicated recipe, as a ratio: 1.02 is 2 %.
        max_memory_mb: constraint on the anonymous memory of the training process and its workers; None for none.
        loss_steps: steps of the baseline's batch size over which losses are compared. The learning rate goes through
            its whole schedule in them.
        loss_seeds: trainings of the baseline, between whose losses a candidate's may lie.
        candidate_seeds: trainings of a candidate.
    """

    optimize: Literal["training"] = "training"
    confidence: Annotated[float, Interval(gt=0.5, lt=1)] = 0.95
    goal_speedup: Annotated[float, Gt(1)] | None = None
    min_gain: Annotated[float, Ge(1), Lt(10)] = 1.02
    max_memory_mb: Annotated[float, Gt(0)] | None = None
    loss_steps: Annotated[int, Ge(20)] = 100
    loss_seeds: Annotated[int, Ge(2)] = 4
    candidate_seeds: Annotated[int, Ge(1)] = 2


TRAINING = "training"
"""Value of `objective.optimize` where training is what is made faster."""

PLAIN_LOADER = ("loader=plain",)
"""The edit that loads rows as a usual `Dataset` and `DataLoader` do."""
PLAIN_STEP = (
    "trainer.precision=float32",
    "trainer.compile=none",
    "trainer.layout=contiguous",
    "trainer.optimizer_kernels=for_loop",
    "trainer.batch_factor=1",
    "trainer.micro_batches=1",
    "trainer.activation_budget_mb=null",
)
"""The edits that calculate a step by PyTorch's defaults, as a script does that says nothing."""


def judge_training(candidate: TrainingEvaluation, best: TrainingEvaluation, objective: TrainingObjective) -> Judgement:
    """Accepts what surely trains more rows per second than the best so far, within its memory, and learns as well."""
    excess, before = (memory_excess(each.memory_bytes, objective) for each in (candidate, best))
    if excess and excess >= before:
        return _rejected(_memory(candidate, objective))
    gained = candidate.speedup["previous"]
    told = f"{gained.value:.2f}x the rows per second of the best before [{gained.low:.2f}, {gained.high:.2f}]"
    closer = excess < before
    if not closer and (reason := _no_gain(gained, objective)):
        return _rejected(f"{reason}: {told}")
    if candidate.loss is None:
        return _rejected(f"its loss was not compared with the baseline's; {told}")
    if not candidate.loss.holds:
        return _rejected(f"faster, but it does not learn as well: {candidate.loss.reason}; {told}")
    start = f"closer to the limit, {_memory(candidate, objective)}; " if closer and excess else ""
    return Judgement(verdict="accepted", holds=excess == 0, reason=f"{start}{told}; loss {candidate.loss.reason}")


def worth_comparing(candidate: TrainingEvaluation, memory_of_best: int, objective: TrainingObjective) -> bool:
    """Whether it would be accepted if it learned as well.

    Args:
        memory_of_best: bytes, as of `TrainingEvaluation.memory_bytes`.
    """
    before, excess = memory_excess(memory_of_best, objective), memory_excess(candidate.memory_bytes, objective)
    if excess < before:
        return True
    return excess == 0 and _no_gain(candidate.speedup["previous"], objective) is None


def binding(evaluation: TrainingEvaluation, objective: TrainingObjective) -> str | None:
    """The limit that is broken, and by how much; None where it holds."""
    return _memory(evaluation, objective) if memory_excess(evaluation.memory_bytes, objective) else None


def memory_excess(memory_bytes: int, objective: TrainingObjective) -> float:
    """Relative distance beyond the limit of memory; 0 inside."""
    if objective.max_memory_mb is None:
        return 0.0
    return max(0.0, memory_bytes / 1e6 / objective.max_memory_mb - 1)


def _no_gain(gained: Ratio, objective: TrainingObjective) -> str | None:
    if gained.high < 1:
        return "fewer rows per second"
    if gained.low <= 1:
        return "not measurably more rows per second"
    if gained.value < objective.min_gain:
        return f"less than objective.min_gain={objective.min_gain:g}"
    return None


def _memory(evaluation: TrainingEvaluation, objective: TrainingObjective) -> str:
    return f"memory {evaluation.memory_bytes / 1e6:.3g} MB of objective.max_memory_mb={objective.max_memory_mb:g}"


def _rejected(reason: str) -> Judgement:
    return Judgement(verdict="rejected", holds=False, reason=reason)
