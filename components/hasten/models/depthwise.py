"""CNN of depthwise and pointwise convolutions."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from torch import Tensor, nn

from hasten.models.sizes import Size, check_input_shape, check_sizes


class DepthwiseCNN(nn.Module):
    """Small CNN whose blocks mix pixels and channels in separate convolutions, for images and spectrograms.

    A 3x3 convolution, one stage per width with `num_blocks` blocks, global mean and a linear layer. Every stage after
    the first halves height and width, rounded up. With `expansion=1` a block is the depthwise 3x3 and pointwise 1x1
    convolution of Howard et al. 2017 (MobileNet); with more it is the inverted residual of Sandler et al. 2018
    (MobileNetV2), which widens its input so many times first and adds the input to its output where the shape stays.

    Args:
        input_shape: (channels, height, width) of a row; a log-mel spectrogram is (1, mels, frames).
        num_outputs: outputs per row.
        widths: channels of each stage.
        num_blocks: blocks per stage.
        expansion: channels of a block's depthwise convolution, in multiples of the block's input.
        stem_stride: 2 halves height and width in the first convolution already.

    Raises:
        ValueError: the input is no image, or a size is not allowed.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: Size,
        widths: Annotated[tuple[Size, ...], MinLen(1)] = (32, 64, 128),
        num_blocks: Size = 2,
        expansion: Size = 1,
        stem_stride: Literal[1, 2] = 1,
    ) -> None:
        super().__init__()
        check_input_shape("DepthwiseCNN", input_shape, "channels", "height", "width")
        check_sizes("DepthwiseCNN", num_outputs=num_outputs, widths=widths, num_blocks=num_blocks, expansion=expansion)
        if stem_stride not in (1, 2):
            raise ValueError(f"DepthwiseCNN: stem_stride must be 1 or 2, got {stem_stride}")
        stem = nn.Conv2d(input_shape[0], widths[0], kernel_size=3, stride=stem_stride, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        num_channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(
                    Separable(num_channels, width, stride)
                    if expansion == 1
                    else InvertedResidual(num_channels, width, stride, expansion)
                )
                num_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_channels, num_outputs)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = self.blocks(self.stem(images_BCHW))
        outputs_BK: Tensor = self.classifier(self.pool(features_BCHW).flatten(1))
        return outputs_BK


class Separable(nn.Sequential):
    """Depthwise 3x3 and pointwise 1x1 convolution, each with batch normalization and ReLU."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__(*_depthwise(num_inputs, stride), nn.ReLU(), *_pointwise(num_inputs, num_outputs), nn.ReLU())


class InvertedResidual(nn.Module):
    """Pointwise, depthwise, pointwise; without ReLU at the narrow end, and added to the input where the shape stays."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        num_inner = num_inputs * expansion
        self.layers = nn.Sequential(
            *_pointwise(num_inputs, num_inner),
            nn.ReLU(),
            *_depthwise(num_inner, stride),
            nn.ReLU(),
            *_pointwise(num_inner, num_outputs),
        )
        self.is_residual = stride == 1 and num_inputs == num_outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.is_residual else y_BCHW


def _depthwise(num_channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(
        num_channels, num_channels, kernel_size=3, stride=stride, padding=1, groups=num_channels, bias=False
    )
    return [convolution, nn.BatchNorm2d(num_channels)]


def _pointwise(num_inputs: int, num_outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(num_inputs, num_outputs, kernel_size=1, bias=False), nn.BatchNorm2d(num_outputs)]
