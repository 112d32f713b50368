"""Distillation from a teacher's outputs as they are, whatever they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch.nn.functional import mse_loss

from hasten.core.interfaces import Distillation, Task


@dataclass(frozen=True, kw_only=True)
class OutputMatching(Distillation):
    """The task's loss and the squared distance from the teacher's outputs (Ba and Caruana 2014), for every task.

    (1 - alpha) L(student, targets) + alpha mean((student - teacher)^2), with the task's loss L and the mean over rows
    and outputs.

    Attributes:
        alpha: weight of the teacher's share, in [0, 1]; at 1 no targets are needed. A task without targets of its own
            (`similarity`) learns from the teacher alone.
    """

    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        matching = mse_loss(student, teacher)
        if self.alpha == 1 or task.learned_from == "baseline":
            return matching
        return (1 - self.alpha) * task.loss(student, targets) + self.alpha * matching
