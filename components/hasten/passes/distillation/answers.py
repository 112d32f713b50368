"""The share of a loss over layers or relations that looks at the answers themselves."""

from __future__ import annotations

import torch

from hasten.core.interfaces import Task
from hasten.passes.distillation.outputs import OutputMatching
from hasten.passes.distillation.soft_labels import SoftLabels


def answer_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    task: Task,
    *,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """`SoftLabels` where outputs are logits of classes, else `OutputMatching`, which knows no temperature."""
    if task.outputs == "classes":
        return SoftLabels(alpha=alpha, temperature=temperature).loss(student, teacher, targets, task)
    return OutputMatching(alpha=alpha).loss(student, teacher, targets, task)
