"""Outputs of layers of two models, brought to the same places so that they can be compared.

Shapes: B rows, C channels, P places (the pixels or steps of a map, flattened).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d

from hasten.core.errors import ConfigError

ChannelAxis = Literal[1, -1]
"""Of a layer's outputs: 1 after convolutions (B, C, ...), -1 for vectors of tokens or steps (B, ..., C)."""

_POOLING: Mapping[int, Callable[..., Tensor]] = {1: adaptive_avg_pool1d, 2: adaptive_avg_pool2d, 3: adaptive_avg_pool3d}


def check_pairs(student_layers: Sequence[str], teacher_layers: Sequence[str], at_least: int) -> None:
    """Refuses layers that don't come in pairs.

    Raises:
        ConfigError: they are not as many, or fewer than that.
    """
    if len(student_layers) != len(teacher_layers) or len(student_layers) < at_least:
        raise ConfigError(
            f"distillation.student_layers and distillation.teacher_layers must name as many layers each"
            f"{', at least 1' if at_least else ''}, got {list(student_layers)} and {list(teacher_layers)}"
        )


def same_places(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C, ...) as (B, C, P), with as many places along each axis as the one that has fewer there.

    The other is averaged to that size; where they don't have the same axes, both are averaged to a single place.
    """
    axes = student.ndim - 2
    if student.ndim != teacher.ndim:
        return _flat(student).mean(2, keepdim=True), _flat(teacher).mean(2, keepdim=True)
    if student.shape[2:] != teacher.shape[2:]:
        sizes = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = (_POOLING[axes](maps, sizes) for maps in (student, teacher))
    return _flat(student), _flat(teacher)


def _flat(maps: Tensor) -> Tensor:
    return maps.reshape(*maps.shape[:2], -1)
