"""What an engine costs before it calculates anything: per call and per operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hasten.core.errors import MeasurementError

if TYPE_CHECKING:
    import torch

CHAIN_INPUT_SHAPE = (1, 4, 4)
"""Of one row that goes into `chain`."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Time that an engine needs whatever the model calculates.

    Attributes:
        call_us: microseconds of one request, once.
        operator_us: microseconds of each operator that it launches.
    """

    call_us: float
    operator_us: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def chain(length: int) -> torch.nn.Module:
    """`length` times a 3x3 convolution of one channel and a ReLU: operators with next to nothing to do.

    The kernels are the identity, so that values neither vanish nor become denormal, which would cost time.

    Returns:
        A module in eval mode that takes (B, *CHAIN_INPUT_SHAPE) and equals one ReLU.
    """
    import torch

    layers: list[torch.nn.Module] = []
    for _ in range(length):
        convolution = torch.nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=False)
        torch.nn.init.dirac_(convolution.weight)
        layers += [convolution, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).eval()


def fit_overhead(lengths: Sequence[float], latencies_us: Sequence[float]) -> Overhead:
    """The line latency = call + length * operator through chains of several lengths, by non-negative least squares.

    Args:
        lengths: how many operators each chain launches. Where an engine fuses convolution and ReLU that is one a link,
            so take the number that its own profiler counts.
        latencies_us: of one request to each chain.

    Raises:
        MeasurementError: fewer than two different lengths, or a latency that is no positive number.
    """
    if len(lengths) != len(latencies_us) or len(set(lengths)) < 2:
        raise MeasurementError(
            f"two chains of different length are needed to tell call and operator apart, got {lengths}"
        )
    if not all(math.isfinite(latency) and latency > 0 for latency in latencies_us):
        raise MeasurementError(f"latencies of the chains must be above 0 us, got {list(latencies_us)}")
    mean_length = sum(lengths) / len(lengths)
    mean_latency = sum(latencies_us) / len(latencies_us)
    pairs = list(zip(lengths, latencies_us, strict=True))
    covariance = sum((length - mean_length) * (latency - mean_latency) for length, latency in pairs)
    operator_us = covariance / sum((length - mean_length) ** 2 for length in lengths)
    if operator_us < 0:
        return Overhead(call_us=mean_latency, operator_us=0.0)
    call_us = mean_latency - operator_us * mean_length
    if call_us < 0:
        through_origin = sum(length * latency for length, latency in pairs) / sum(length**2 for length in lengths)
        return Overhead(call_us=0.0, operator_us=through_origin)
    return Overhead(call_us=call_us, operator_us=operator_us)
