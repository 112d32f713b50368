"""Fully connected network."""

from __future__ import annotations

import itertools
import math
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

Size = Annotated[int, Ge(1)]


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened row.

    Args:
        input_shape: of a row, of any rank.
        num_outputs: outputs per row.
        hidden: units of each hidden layer; empty for a linear model.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self, *, input_shape: tuple[int, ...], num_outputs: Size, hidden: tuple[Size, ...] = (512, 512)
    ) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *hidden, num_outputs]
        if min(sizes) < 1:
            raise ValueError(
                f"MLP: every size must be at least 1, got input_shape={tuple(input_shape)}, hidden={list(hidden)}, "
                f"num_outputs={num_outputs}"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], num_outputs))

    def forward(self, rows: Tensor) -> Tensor:
        logits_BC: Tensor = self.layers(rows)
        return logits_BC
