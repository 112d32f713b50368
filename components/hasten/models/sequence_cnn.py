"""One-dimensional CNN for numeric sequences."""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge, MinLen
from torch import Tensor, nn

from hasten.models.sizes import Size, check_input_shape, check_sizes


class SequenceCNN(nn.Module):
    """Convolutions over the steps of a sequence, each of which halves its length, and a linear layer on what is left.

    The linear layer sees every place of the last convolution, so that the outputs may depend on when something
    happened, as forecasts do.

    Args:
        input_shape: (channels, length) of a row, oldest step first.
        num_outputs: outputs per row.
        widths: channels of each convolution, which is followed by batch normalization and ReLU.
        kernel_size: steps that a convolution sees, an odd number.
        highway: this many last steps also go to the outputs through a linear layer of their own, past the convolutions:
            the autoregressive part of Lai et al. 2018 (LSTNet), which gives a forecast the level of the series.
            0: none.

    Raises:
        ValueError: rows are no sequences of channels, a size is not allowed, or the sequence is shorter than `highway`.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: Size,
        widths: Annotated[tuple[Size, ...], MinLen(1)] = (32, 64, 64),
        kernel_size: Size = 5,
        highway: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        check_input_shape("SequenceCNN", input_shape, "channels", "length")
        check_sizes("SequenceCNN", num_outputs=num_outputs, widths=widths, kernel_size=kernel_size)
        if not 0 <= highway <= input_shape[1]:
            raise ValueError(
                f"SequenceCNN: highway must be in [0, {input_shape[1]}], the length of a row, got {highway}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"SequenceCNN: kernel_size must be odd, got {kernel_size}")
        num_channels, length = input_shape
        layers: list[nn.Module] = []
        for width in widths:
            layers += [
                nn.Conv1d(num_channels, width, kernel_size, stride=2, padding=kernel_size // 2, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            ]
            num_channels, length = width, math.ceil(length / 2)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.output = nn.Linear(num_channels * length, num_outputs)
        self.num_highway = highway
        self.highway = nn.Linear(input_shape[0] * highway, num_outputs) if highway else None

    def forward(self, steps_BCL: Tensor) -> Tensor:
        outputs_BK: Tensor = self.output(self.layers(steps_BCL))
        if self.highway is not None:
            outputs_BK = outputs_BK + self.highway(steps_BCL[:, :, -self.num_highway :].flatten(1))
        return outputs_BK
