"""Recurrent network for numeric sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor, nn

from hasten.models.sizes import Size, check_input_shape, check_sizes


class Recurrent(nn.Module):
    """LSTM or GRU over the steps of a sequence, and a linear layer on its last output.

    Args:
        input_shape: (channels, length) of a row, oldest step first.
        num_outputs: outputs per row.
        cell: `lstm` or `gru`.
        hidden: units of each layer.
        num_layers: recurrent layers on top of one another.
        highway: this many last steps also go to the outputs through a linear layer of their own, past the recurrent
            ones: the autoregressive part of Lai et al. 2018 (LSTNet). It gives a forecast the level of the series,
            which the recurrent layers would have to carry. 0: none.

    Raises:
        ValueError: rows are no sequences of channels, a size is below 1, or the sequence is shorter than `highway`.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: Size,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden: Size = 64,
        num_layers: Size = 1,
        highway: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        check_input_shape("Recurrent", input_shape, "channels", "length")
        check_sizes("Recurrent", num_outputs=num_outputs, hidden=hidden, num_layers=num_layers)
        if not 0 <= highway <= input_shape[1]:
            raise ValueError(f"Recurrent: highway must be in [0, {input_shape[1]}], the length of a row, got {highway}")
        cells = {"lstm": nn.LSTM, "gru": nn.GRU}
        if cell not in cells:
            raise ValueError(f"Recurrent: cell must be lstm or gru, got {cell!r}")
        num_channels = input_shape[0]
        self.recurrent = cells[cell](num_channels, hidden, num_layers, batch_first=True)
        self.output = nn.Linear(hidden, num_outputs)
        self.num_highway = highway
        self.highway = nn.Linear(num_channels * highway, num_outputs) if highway else None

    def forward(self, steps_BCL: Tensor) -> Tensor:
        states_BLH, _ = self.recurrent(steps_BCL.transpose(1, 2))
        outputs_BK: Tensor = self.output(states_BLH[:, -1])
        if self.highway is not None:
            outputs_BK = outputs_BK + self.highway(steps_BCL[:, :, -self.num_highway :].flatten(1))
        return outputs_BK
