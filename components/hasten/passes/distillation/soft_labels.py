"""Distillation from a teacher's softened outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch.nn.functional import cross_entropy

from hasten.core.interfaces import Distillation, Task


@dataclass(frozen=True, kw_only=True)
class SoftLabels(Distillation):
    """The task's loss and cross-entropy with the teacher's softened probabilities (Hinton, Vinyals and Dean 2015).

    (1 - alpha) L(student, labels) + alpha T^2 H(s(teacher / T), s(student / T)), with the task's loss L, the softmax s
    and the cross-entropy H, mean of the batch. T^2 keeps the gradient of the soft share as large as it is at T = 1.

    Attributes:
        alpha: weight of the teacher's share, in [0, 1].
        temperature: T, which softens both outputs; 1 leaves them as they are.
    """

    outputs: ClassVar[Literal["classes", "numbers"] | None] = "classes"

    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Gt(0)] = 4.0

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        soft_BC = torch.softmax(teacher / self.temperature, dim=1)
        soft_loss = cross_entropy(student / self.temperature, soft_BC)
        return (1 - self.alpha) * task.loss(student, targets) + self.alpha * self.temperature**2 * soft_loss
