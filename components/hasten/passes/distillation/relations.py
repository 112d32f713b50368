"""Distillation from how rows lie to one another.

Shapes: B rows of a batch, D numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn
from torch.nn.functional import huber_loss

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Distillation, Task
from hasten.passes.distillation.answers import answer_loss
from hasten.passes.distillation.maps import check_pairs

_LEAST_SQUARE = 1e-12
"""Squared distances below it count as this where they are rooted or divided by."""


@dataclass(frozen=True, kw_only=True)
class RelationalKnowledge(Distillation):
    """The loss of the answers, and how far rows are from one another and at which angles (Park et al. 2019).

    answers + distance_weight * mean over pairs of h(d(student), d(teacher)) + angle_weight * mean over triplets of
    h(c(student), c(teacher)), with the Huber loss h, the distance d of two rows as a share of the batch's mean, and the
    cosine c of the angle at one row between two others. It compares spaces of any size: outputs, embeddings, or layers
    that give a vector a row (others are flattened; memory grows with the square of the batch times their size).

    Attributes:
        student_layers: dotted paths, as `model.named_modules()` spells them; empty for the outputs themselves.
        teacher_layers: each compared with the student's at the same place of the list.
        distance_weight: of the distances' share. The paper takes 25 and 50 for layers before the head; the outputs,
            which have to answer as well, bear a tenth of it.
        angle_weight: of the angles' share.
        alpha: weight of the teacher's answers against the targets, in [0, 1], as of `SoftLabels` and `OutputMatching`.
        temperature: as of `SoftLabels`; without effect where outputs are numbers.
    """

    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    distance_weight: Annotated[float, Ge(0)] = 2.5
    angle_weight: Annotated[float, Ge(0)] = 5.0
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Gt(0)] = 4.0

    def __post_init__(self) -> None:
        check_pairs(self.student_layers, self.teacher_layers, at_least=0)
        if self.distance_weight == self.angle_weight == 0:
            raise ConfigError("distillation.distance_weight and distillation.angle_weight must not both be 0")

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        answers = answer_loss(student, teacher, targets, task, alpha=self.alpha, temperature=self.temperature)
        return answers if self.student_layers else answers + self._relations(student, teacher)

    @property
    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.student_layers, self.teacher_layers

    def layer_loss(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], projections: Sequence[nn.Module]
    ) -> torch.Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([self._relations(mine, theirs) for mine, theirs in pairs]).mean()

    def _relations(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows = len(student)
        (mine_BB, mine_BBB), (theirs_BB, theirs_BBB) = (_relations_of(given.flatten(1)) for given in (student, teacher))
        # Means over different rows: where two are the same, both sides agree and the sum has nothing of them.
        pairs, triplets = max(1, rows * (rows - 1)), max(1, rows * (rows - 1) * (rows - 2))
        distances = huber_loss(mine_BB, theirs_BB, reduction="sum") / pairs
        angles = huber_loss(mine_BBB, theirs_BBB, reduction="sum") / triplets
        return self.distance_weight * distances + self.angle_weight * angles


def _relations_of(rows_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (B, B) as a share of their mean, and cosines (B, B, B) of the angle at the first between two others."""
    apart_BBD = rows_BD[None, :, :] - rows_BD[:, None, :]
    squares_BB = apart_BBD.square().sum(2)
    # Equal rows have no direction, and neither root nor quotient a slope there that would be of use.
    differ_BB, roots_BB = squares_BB > 0, squares_BB.clamp(min=_LEAST_SQUARE).sqrt()
    distances_BB = differ_BB * roots_BB
    directions_BBD = differ_BB[:, :, None] * apart_BBD / roots_BB[:, :, None]
    pairs = max(1, len(rows_BD) * (len(rows_BD) - 1))
    mean = (distances_BB.sum() / pairs).clamp(min=_LEAST_SQUARE)
    return distances_BB / mean, directions_BBD @ directions_BBD.transpose(1, 2)
