"""Distillation from what the teacher's layers give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import nn
from torch.nn.functional import mse_loss

from hasten.core.interfaces import Distillation, Task
from hasten.passes.distillation.answers import answer_loss
from hasten.passes.distillation.maps import ChannelAxis, check_pairs, same_places


@dataclass(frozen=True, kw_only=True)
class FeatureMaps(Distillation):
    """The loss of the answers, and the squared distance between layers of both (FitNets, Romero et al. 2015).

    answers + weight * mean over pairs of mean((r(student) - teacher)^2), where r is a learned 1x1 convolution where the
    two have other numbers of channels, and nothing where they have the same. Unlike the paper's hints it is no stage of
    its own before the distillation: both are learned at once.

    Attributes:
        student_layers: dotted paths, as `model.named_modules()` spells them.
        teacher_layers: each compared with the student's at the same place of the list.
        weight: of the layers' share.
        channel_axis: of what the layers give.
        alpha: weight of the teacher's answers against the targets, in [0, 1], as of `SoftLabels` and `OutputMatching`.
        temperature: as of `SoftLabels`; without effect where outputs are numbers.
    """

    student_layers: tuple[str, ...] = ("blocks",)
    teacher_layers: tuple[str, ...] = ("blocks",)
    weight: Annotated[float, Gt(0)] = 1.0
    channel_axis: ChannelAxis = 1
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Gt(0)] = 4.0

    def __post_init__(self) -> None:
        check_pairs(self.student_layers, self.teacher_layers, at_least=1)

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        return answer_loss(student, teacher, targets, task, alpha=self.alpha, temperature=self.temperature)

    @property
    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.student_layers, self.teacher_layers

    def projections(
        self, student: Sequence[tuple[int, ...]], teacher: Sequence[tuple[int, ...]]
    ) -> Sequence[nn.Module]:
        channels = [
            (mine[self.channel_axis], theirs[self.channel_axis]) for mine, theirs in zip(student, teacher, strict=True)
        ]
        return [nn.Identity() if mine == theirs else nn.Conv1d(mine, theirs, 1) for mine, theirs in channels]

    def layer_loss(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], projections: Sequence[nn.Module]
    ) -> torch.Tensor:
        distances = []
        for mine, theirs, project in zip(student, teacher, projections, strict=True):
            # Averaged over places before it is projected, which gives the same and costs less: both are linear.
            mine_BCP, theirs_BCP = same_places(mine.movedim(self.channel_axis, 1), theirs.movedim(self.channel_axis, 1))
            distances.append(mse_loss(project(mine_BCP), theirs_BCP))
        return self.weight * torch.stack(distances).mean()
