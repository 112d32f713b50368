"""Residual CNN for small images."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen
from torch import Tensor, nn

from hasten.models.sizes import Size, check_sizes


class ResNet(nn.Module):
    """Residual network of basic blocks without a stem's downsampling (He et al. 2015, section 4.2).

    A 3x3 convolution, one stage per width with `num_blocks` residual blocks, global mean and a linear classifier. Every
    stage after the first halves height and width, rounded up.

    Args:
        input_shape: (channels, height, width) of a row.
        num_outputs: outputs per row.
        widths: channels of each stage.
        num_blocks: residual blocks per stage, two convolutions each.

    Raises:
        ValueError: the input is no image, or a size is below 1.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: Size,
        widths: Annotated[tuple[Size, ...], MinLen(1)] = (32, 64, 128),
        num_blocks: Size = 3,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"ResNet needs input_shape (channels, height, width), with 1 channel for grey, got {tuple(input_shape)}"
            )
        check_sizes("ResNet", num_outputs=num_outputs, widths=widths, num_blocks=num_blocks)
        self.stem = nn.Sequential(_convolution(input_shape[0], widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = []
        num_channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(num_blocks):
                blocks.append(ResidualBlock(num_channels, width, stride=2 if stage > 0 and block == 0 else 1))
                num_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_channels, num_outputs)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = self.blocks(self.stem(images_BCHW))
        logits_BK: Tensor = self.classifier(self.pool(features_BCHW).flatten(1))
        return logits_BK


class ResidualBlock(nn.Module):
    """ReLU(convolutions(x) + shortcut(x)); the shortcut is a 1x1 convolution where the shape changes, else x itself."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = _convolution(num_inputs, num_outputs, stride)
        self.normalization1 = nn.BatchNorm2d(num_outputs)
        self.convolution2 = _convolution(num_outputs, num_outputs)
        self.normalization2 = nn.BatchNorm2d(num_outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            projection = nn.Conv2d(num_inputs, num_outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(num_outputs))
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.relu1(self.normalization1(self.convolution1(x_BCHW)))
        y_BCHW = self.normalization2(self.convolution2(y_BCHW))
        output_BCHW: Tensor = self.relu2(y_BCHW + self.shortcut(x_BCHW))
        return output_BCHW


def _convolution(num_inputs: int, num_outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_inputs, num_outputs, kernel_size=3, stride=stride, padding=1, bias=False)
