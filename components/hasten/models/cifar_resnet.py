"""Residual CNN for small images with shortcuts that have no parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from hasten.models.sizes import Size, check_input_shape, check_sizes


class CifarResNet(nn.Module):
    """The residual network of He et al. 2015, section 4.2, for CIFAR-10: 6 * num_blocks + 2 layers in three stages.

    A 3x3 convolution, one stage per width with `num_blocks` residual blocks, global mean and a linear layer. Every
    stage after the first halves height and width, rounded up, and its first shortcut takes every second pixel and fills
    the channels that are new with zeros (option A of the paper). Names and arithmetic are those of
    github.com/akamaster/pytorch_resnet_cifar10, so that its weights load as they are: 20 layers are `num_blocks=3`,
    56 are 9, 110 are 18.

    Args:
        input_shape: (channels, height, width) of a row.
        num_outputs: outputs per row.
        num_blocks: residual blocks per stage, two convolutions each.
        widths: channels of each stage, none fewer than the one before.

    Raises:
        ValueError: the input is no image, a size is below 1, or a width is less than the one before.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        num_outputs: Size,
        num_blocks: Size = 9,
        widths: Annotated[tuple[Size, ...], MinLen(1)] = (16, 32, 64),
    ) -> None:
        super().__init__()
        check_input_shape("CifarResNet", input_shape, "channels", "height", "width")
        check_sizes("CifarResNet", num_outputs=num_outputs, num_blocks=num_blocks, widths=widths)
        if any(narrower > wider for narrower, wider in pairwise(widths)):
            raise ValueError(
                f"CifarResNet: widths must not decrease, as its shortcuts only add channels, got {list(widths)}"
            )
        self.num_stages = len(widths)
        self.conv1 = _convolution(input_shape[0], widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        num_channels = widths[0]
        for stage, width in enumerate(widths):
            strides = [2 if stage > 0 else 1] + [1] * (num_blocks - 1)
            before = [num_channels] + [width] * (num_blocks - 1)
            blocks = [Block(num, width, stride) for num, stride in zip(before, strides, strict=True)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            num_channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(num_channels, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = self.relu(self.bn1(self.conv1(images_BCHW)))
        for stage in range(self.num_stages):
            features_BCHW = self.get_submodule(f"layer{stage + 1}")(features_BCHW)
        outputs_BK: Tensor = self.linear(self.pool(features_BCHW).flatten(1))
        return outputs_BK


class Block(nn.Module):
    """ReLU(convolutions(x) + shortcut(x)); the shortcut is x itself where the shape does not change."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(num_inputs, num_outputs, stride)
        self.bn1 = nn.BatchNorm2d(num_outputs)
        self.conv2 = _convolution(num_outputs, num_outputs)
        self.bn2 = nn.BatchNorm2d(num_outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            self.shortcut = ZeroPadded(num_outputs - num_inputs, stride)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.relu1(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        output_BCHW: Tensor = self.relu2(y_BCHW + self.shortcut(x_BCHW))
        return output_BCHW


class ZeroPadded(nn.Module):
    """Every `stride`-th pixel, between `num_new` channels of zeros, half of them on either side."""

    def __init__(self, num_new: int, stride: int) -> None:
        super().__init__()
        self.num_before = num_new // 2
        self.num_after = num_new - self.num_before
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        # Not functional.pad: torch-pruning takes that for elementwise, and would remove channels of the convolutions
        # that are not the ones that the shortcut adds to. Of a concatenation it knows that it must leave it whole.
        # Zeros made of a channel, not of sizes: OpenVINO 2026.4 gets a dynamic batch of those wrong in integers.
        zeros_B1HW = torch.zeros_like(x_BCHW[:, :1])
        before, after = (zeros_B1HW.expand(-1, num, -1, -1) for num in (self.num_before, self.num_after))
        return torch.cat([before, x_BCHW, after], dim=1)


def _convolution(num_inputs: int, num_outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_inputs, num_outputs, kernel_size=3, stride=stride, padding=1, bias=False)
