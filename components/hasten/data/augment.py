"""Random changes of training rows that leave their targets right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Augment

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RandomFlip(Augment):
    """Mirrors rows left to right (their last axis), each with the same probability.

    Draws one uniform number a row from torch's global generator.

    Attributes:
        column: the input that is flipped, (B, channels, ..., width); None: the first.
        probability: of a row to be flipped, in [0, 1].
    """

    column: str | None = None
    probability: Annotated[float, Interval(ge=0, le=1)] = 0.5

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        import torch

        name, rows = _input(inputs, self.column, "RandomFlip")
        flipped_B = torch.rand(len(rows), device=rows.device) < self.probability
        chosen = flipped_B.reshape(-1, *(1,) * (rows.ndim - 1))
        return {**inputs, name: torch.where(chosen, rows.flip(-1), rows)}


@dataclass(frozen=True, kw_only=True)
class RandomCrop(Augment):
    """Shifts rows along every axis behind the channels; what comes in from outside is 0, the mean of normalised rows.

    The same as padding with zeros and cutting the size out again somewhere. Draws one whole number a row and axis from
    torch's global generator, uniform over the 2 * padding + 1 shifts, the first axis first.

    Attributes:
        column: the input that is shifted, (B, channels, height, width) or (B, channels, length); None: the first.
        padding: largest shift in pixels or steps, either way.
    """

    column: str | None = None
    padding: Annotated[int, Ge(1)] = 4

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        import torch
        from torch.nn.functional import pad

        name, rows = _input(inputs, self.column, "RandomCrop")
        cropped = pad(rows, (self.padding, self.padding) * (rows.ndim - 2))
        for axis in range(2, rows.ndim):
            size = rows.shape[axis]
            starts_B1 = torch.randint(2 * self.padding + 1, (len(rows), 1), device=rows.device)
            places_BS = starts_B1 + torch.arange(size, device=rows.device)
            along = [1] * rows.ndim
            along[0], along[axis] = len(rows), size
            cropped = torch.take_along_dim(cropped, places_BS.reshape(along), dim=axis)
        return {**inputs, name: cropped}


def _input(inputs: Mapping[str, torch.Tensor], column: str | None, who: str) -> tuple[str, torch.Tensor]:
    name = next(iter(inputs)) if column is None else column
    if name not in inputs:
        raise ConfigError(f"{who}.column must be one of {', '.join(inputs)}, got {column} (data.augment)")
    rows = inputs[name]
    if rows.ndim < 3:
        raise ConfigError(
            f"{who} changes images and sequences (rows, channels, ...), but {name} has the shape {tuple(rows.shape)} "
            "(data.augment)"
        )
    return name, rows
