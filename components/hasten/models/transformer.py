"""Transformer encoder for token sequences."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional

from hasten.models.sizes import Size, check_input_shape, check_sizes

_IGNORED = -1e4
"""Added to the scores of padding: its share of the attention is 0 in float32 and half precision, and where all of a row
is padding the shares stay finite, which they would not with minus infinity."""


class Transformer(nn.Module):
    """Classifies token sequences: pre-norm encoder layers (Xiong et al. 2020), mean over the tokens, a linear layer.

    Rows of one batch are padded to one length. What the padding holds changes nothing; a row of padding alone gives the
    bias of the last layer.

    Args:
        input_shape: (length,) of the longest row, for which positions are learned.
        vocabulary_size: of the token ids, which are in [0, vocabulary_size).
        num_outputs: outputs per row.
        width: of the token vectors.
        num_heads: attention heads per layer, a divisor of `width`.
        num_layers: encoder layers.
        feedforward: units between a layer's two linear layers.
        dropout: share of activations dropped in training, in [0, 1).

    Raises:
        ValueError: rows are no sequences of tokens, a size is below 1, or `num_heads` does not divide `width`.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        vocabulary_size: Size,
        num_outputs: Size,
        width: Size = 128,
        num_heads: Size = 4,
        num_layers: Size = 4,
        feedforward: Size = 256,
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1,
    ) -> None:
        super().__init__()
        check_input_shape("Transformer", input_shape, "length")
        check_sizes(
            "Transformer",
            vocabulary_size=vocabulary_size,
            num_outputs=num_outputs,
            width=width,
            num_heads=num_heads,
            num_layers=num_layers,
            feedforward=feedforward,
        )
        if width % num_heads:
            raise ValueError(f"Transformer: num_heads must divide width, got num_heads={num_heads}, width={width}")
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(input_shape[0], width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads, feedforward, dropout) for _ in range(num_layers))
        self.normalization = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_outputs)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Outputs (B, num_outputs).

        Args:
            ids: of tokens, (B, L) int64, with L at most the length of `input_shape`.
            mask: 1 for tokens, 0 for padding, (B, L) of any type.
        """
        places_L = torch.arange(ids.shape[1], device=ids.device)
        x_BLW = self.dropout(self.tokens(ids) + self.positions(places_L))
        mask_BL = mask.to(x_BLW.dtype)
        bias_B11L = (1 - mask_BL)[:, None, None, :] * _IGNORED
        for layer in self.layers:
            x_BLW = layer(x_BLW, bias_B11L)
        x_BLW = self.normalization(x_BLW) * mask_BL[:, :, None]
        mean_BW = x_BLW.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        outputs_BK: Tensor = self.classifier(mean_BW)
        return outputs_BK


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer network with GELU, each normalised before and added to its input."""

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.normalization1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.normalization2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor, bias_B11L: Tensor) -> Tensor:
        x_BLW = x_BLW + self.dropout(self.attention(self.normalization1(x_BLW), bias_B11L))
        y_BLF = self.activation(self.linear1(self.normalization2(x_BLW)))
        output_BLW: Tensor = x_BLW + self.dropout(self.linear2(y_BLF))
        return output_BLW


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) of separate linear layers, so that each can be pruned, quantized
    and timed. The heads follow from the width of the layers: whoever removes whole heads changes nothing else."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BLW: Tensor, bias_B11L: Tensor) -> Tensor:
        query, key, value = (self._heads(layer(x_BLW)) for layer in (self.query, self.key, self.value))
        y_BHLS = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias_B11L)
        y_BLW: Tensor = self.out(y_BHLS.transpose(1, 2).flatten(2))
        return y_BLW

    def _heads(self, x_BLW: Tensor) -> Tensor:
        """(B, heads, L, head_size)"""
        rows, length, _ = x_BLW.shape
        return x_BLW.view(rows, length, -1, self.head_size).transpose(1, 2)
