"""Distillation from the direction of a teacher's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch.nn.functional import cosine_similarity

from hasten.core.interfaces import Distillation, Task


@dataclass(frozen=True, kw_only=True)
class CosineMatching(Distillation):
    """The task's loss and the cosine distance from the teacher's outputs, for embeddings that are compared by angle.

    (1 - alpha) L(student, targets) + alpha mean(1 - cos(student, teacher)), with the task's loss L and the cosine of
    the angle between a row's two outputs: what the metric of `similarity` judges by. Lengths are left free.

    Attributes:
        alpha: weight of the teacher's share, in [0, 1]; at 1 no targets are needed. A task without targets of its own
            (`similarity`) learns from the teacher alone.
    """

    outputs: ClassVar[Literal["classes", "numbers"] | None] = "numbers"

    alpha: Annotated[float, Interval(ge=0, le=1)] = 1.0

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        distance = (1 - cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1)).mean()
        if self.alpha == 1 or task.learned_from == "baseline":
            return distance
        return (1 - self.alpha) * task.loss(student, targets) + self.alpha * distance
