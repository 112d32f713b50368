"""Fake quantizers: modules that round floats to the values which few bits can stand for, and let gradients through."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from hasten.passes.quantization.ranges import grid


class AffineQuantizer(nn.Module):
    """x -> step * clip(round(x / step), first, last): the affine map to integers and its inverse, in one.

    With min = step * first and max = step * last this is q = round((x - min) / (max - min) * (2^b - 1)) and
    x = min + q * (max - min) / (2^b - 1), for x clipped to [min, max]. That both ends are multiples of the step makes
    zero exact (`ranges.grid`), and with it padding and the zeros of a ReLU.

    The gradient of the rounding is taken for 1 (straight-through: Bengio et al. 2013), so that it passes inside of the
    range and is zero outside (Jacob et al. 2018). A learned range is the calibrated one times exp(`log_scale`); its
    gradient, (round(x / step) - x / step) * step inside and the end of the range outside, is the one of LSQ (Esser et
    al. 2020), and the logarithm makes an optimizer's steps relative to its size (TQT: Jain et al. 2020). Zero stays on
    its level.

    Attributes:
        step: > 0, of a shape that broadcasts to x; so are `first` and `last`.
        first: the first integer, <= 0.
        last: the last integer, >= 0.
        log_scale: trained, of the shape of the step; None where the range is fixed.
    """

    step: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, step: Tensor, first: Tensor, last: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.register_buffer("step", step)
        self.register_buffer("first", first)
        self.register_buffer("last", last)
        self.log_scale = nn.Parameter(torch.zeros_like(step)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        step = self.step if self.log_scale is None else self.step * self.log_scale.exp()
        # Clipped first: what is rounded can't be too large for an exporter's or an engine's integers.
        return rounded(torch.clamp(x / step, self.first, self.last)) * step

    def settled(self) -> AffineQuantizer:
        """A copy with the range as it is now, learning no more."""
        scale = 1.0 if self.log_scale is None else self.log_scale.detach().exp()
        return AffineQuantizer(self.step * scale, self.first, self.last, learned=False)


def affine_quantizer(
    low: ArrayLike,
    high: ArrayLike,
    bits: int,
    *,
    symmetric: bool,
    shape: tuple[int, ...] = (),
    last: int | None = None,
    learned: bool = False,
) -> AffineQuantizer:
    """The quantizer of one range, or of the range of each channel.

    Args:
        low: <= 0; one number or (C,).
        high: >= 0; one number or (C,).
        bits: of the integers.
        shape: that broadcasts the channels to the values, such as (C, 1, 1, 1); () for one range.
        last: the largest integer of a symmetric range; None: 2^(bits - 1) - 1.
        learned: scale the range in training.
    """
    ends = zip(np.atleast_1d(low).tolist(), np.atleast_1d(high).tolist(), strict=True)
    steps, firsts, lasts = zip(*(grid(*pair, bits, symmetric=symmetric) for pair in ends), strict=True)
    step, first, top = (torch.tensor(values, dtype=torch.float64) for values in (steps, firsts, lasts))
    if last is not None:
        step, first, top = step * top / last, torch.full_like(first, -last), torch.full_like(top, last)
    step, first, top = (values.view(shape).float() for values in (step, first, top))
    return AffineQuantizer(step, first, top, learned=learned)


class LogarithmicQuantizer(nn.Module):
    """x -> min - 1 + exp(q / n * r) with q = round(log(x - min + 1) / r * n), r = log(max - min + 1), n = 2^bits - 1.

    x is clipped to [min, max] first. Levels are dense at the minimum and thin out upwards (Miyashita et al. 2016). Zero
    is a level where it is the minimum, as after a ReLU; else it is up to half a step off.

    The rounding passes gradients on (straight-through); logarithm and exponential keep their own, whose product is
    (x' - min + 1) / (x - min + 1) for an output of x': 1 but for what was rounded. So the map is differentiated as it
    stands, with a gradient of zero outside of the range.
    """

    low: Tensor
    span: Tensor
    last: Tensor

    def __init__(self, low: float, high: float, bits: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("span", torch.tensor(high - low))
        self.register_buffer("last", torch.tensor(2.0**bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        # Nothing but one value was seen: any range does, and a range of zero would divide by zero.
        span = torch.where(self.span > 0, self.span, 1.0)
        whole = torch.log(span + 1)
        above = torch.clamp(x - self.low, torch.zeros_like(span), span)
        integers = rounded(torch.log(above + 1) / whole * self.last)
        return torch.exp(integers / self.last * whole) - 1 + self.low

    def settled(self) -> LogarithmicQuantizer:
        """Itself: it learns nothing."""
        return self


class PowerOfTwoQuantizer(nn.Module):
    """w -> 0 or the nearest of +-2^k with k in [largest - number + 1, largest] (INQ: Zhou et al. 2017).

    |w| becomes 2^k from 3/4 to 3/2 of it, and 0 below half of the smallest power. The gradient passes through
    unchanged, but for weights above 3/2 of the largest power, where it is zero.

    Attributes:
        largest: exponent, of a shape that broadcasts to w.
        number: of exponents.
    """

    largest: Tensor
    number: Tensor

    def __init__(self, largest: Tensor, number: int) -> None:
        super().__init__()
        self.register_buffer("largest", largest)
        self.register_buffer("number", torch.tensor(float(number)))

    def forward(self, weight: Tensor) -> Tensor:
        end = 1.5 * torch.exp2(self.largest)
        clipped = torch.clamp(weight, -end, end)
        smallest = self.largest - self.number + 1
        magnitude = clipped.detach().abs()
        exponents = torch.floor(torch.log2(magnitude * (4 / 3)))
        # ldexp is exact where exp2 of a whole number need not be.
        powers = torch.ldexp(torch.sign(clipped.detach()), torch.clamp(exponents, smallest, self.largest).int())
        return _through(clipped, torch.where(magnitude < torch.exp2(smallest - 1), 0.0, powers))


def rounded(x: Tensor) -> Tensor:
    """To the nearest integer, half to even, with a gradient of 1."""
    return _through(x, torch.round(x.detach()))


def _through(x: Tensor, value: Tensor) -> Tensor:
    result: Tensor = _Through.apply(x, value)  # type: ignore[no-untyped-call]
    return result


class _Through(torch.autograd.Function):
    """The value of the one, bit for bit, with the gradient of the other. x + (value - x) would round once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
