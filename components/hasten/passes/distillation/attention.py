"""Distillation from where the teacher's layers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import nn
from torch.nn.functional import normalize

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Distillation, Task
from hasten.passes.distillation.answers import answer_loss
from hasten.passes.distillation.maps import ChannelAxis, check_pairs, same_places


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Distillation):
    """The loss of the answers, and the distance between attention maps (Zagoruyko and Komodakis 2017).

    answers + weight * mean over pairs and rows of |a(student) - a(teacher)|^2, where a is the sum of the squares over
    the channels at each place, as a vector of length 1. It needs no projection, whatever the channels are. The authors'
    code takes the mean over the places and the sum over the pairs: its beta of 1000 is a weight of 1000 pairs / places.

    Attributes:
        student_layers: dotted paths, as `model.named_modules()` spells them, of layers that give maps.
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
        """None; it refuses layers that don't look anywhere.

        Raises:
            ConfigError: layers give no maps, or maps with other axes.
        """
        for place, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
            if len(mine) != len(theirs) or len(mine) < 3:
                raise ConfigError(
                    "attention maps need layers with the same axes, places among them, got "
                    f"{self.student_layers[place]} {mine} and {self.teacher_layers[place]} {theirs} "
                    f"(distillation.student_layers[{place}])"
                )
        return ()

    def layer_loss(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], projections: Sequence[nn.Module]
    ) -> torch.Tensor:
        distances = []
        for mine, theirs in zip(student, teacher, strict=True):
            mine_B1P, theirs_B1P = same_places(self._attention(mine), self._attention(theirs))
            difference_B1P = normalize(mine_B1P, dim=2) - normalize(theirs_B1P, dim=2)
            distances.append(difference_B1P.square().sum(2).mean())
        return self.weight * torch.stack(distances).mean()

    def _attention(self, given: torch.Tensor) -> torch.Tensor:
        return given.movedim(self.channel_axis, 1).square().sum(1, keepdim=True)
