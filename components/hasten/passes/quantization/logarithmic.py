"""Weights that are powers of two and activations on a logarithmic scale: for hardware where a product is a shift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from hasten.core.interfaces import Bench, Columns, Graph, TrainedGraphPass
from hasten.passes.quantization.ranges import Histogram

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LogarithmicQuantization(TrainedGraphPass):
    """Inputs q = round(log(a - min + 1) / log(max - min + 1) * (2^b - 1)) and weights 0 or +-2^k for convolutions and
    linear layers, with training through the rounding where `quantization.training` declares it.

    See `fake.LogarithmicQuantizer` (Miyashita et al. 2016) and `fake.PowerOfTwoQuantizer` (INQ: Zhou et al. 2017). It
    pays where a shifter replaces a multiplier, on FPGAs and ASICs. On processors it is a simulation in floats, and the
    logarithms cost time.

    Attributes:
        weight_bits: of each weight: a sign and 2^(bits - 1) - 1 exponents, with one code left for zero. The largest
            exponent is that of the largest weight.
        activation_bits: of what goes into each layer; None: only the weights are quantized.
        per_channel: exponents of its own for every output channel instead of one set per layer.
        activation_ranges: how min and max are chosen; see `ranges.Histogram.range`.
        percentile: share of the values inside of the range, in percent, where ranges are percentiles.
        calibration_rows: training rows that ranges are measured on.
        keep: layers that stay float: `first`, `last` (as they run), or the dotted path of a layer or a block of them.
        bias_correction: take back the mean that quantization adds to the outputs of every layer (Nagel et al. 2019).
    """

    relieves: ClassVar[tuple[str, ...]] = ("capacity",)
    never_with: ClassVar[tuple[str, ...]] = ("engine=eager", "engine=inductor")

    weight_bits: Annotated[int, Interval(ge=2, le=8)] = 4
    activation_bits: Annotated[int, Interval(ge=2, le=16)] | None = 4
    per_channel: bool = True
    activation_ranges: Literal["minmax", "percentile"] = "percentile"
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    calibration_rows: Annotated[int, Ge(1)] = 256
    keep: tuple[str, ...] = ()
    bias_correction: bool = True

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path, bench: Bench) -> tuple[str, ...]:
        from hasten.passes.quantization.widths import check_family, simulate

        check_family(family)
        rows = {name: values[: self.calibration_rows] for name, values in calibration.items()}
        simulation = simulate(self, graph, rows, bench, keep=self.keep, bias_correction=self.bias_correction)
        file = folder / "model.onnx"
        simulation.write(graph, file)
        inputs = "" if self.activation_bits is None else f" and logarithmic activations of {self.activation_bits} bits"
        return (
            f"powers of two of {self.weight_bits} bits as weights{inputs} are simulated in 32-bit floats: they pay "
            "where a multiplication becomes a shift, on FPGAs and ASICs, and cost time on CPUs and GPUs; "
            f"{simulation.cost(self.weight_bits, file)}",
            *simulation.notes,
        )

    def weight_quantizer(self, weight: Tensor, axis: int) -> nn.Module:
        import torch

        from hasten.passes.quantization.fake import PowerOfTwoQuantizer

        axes = [each for each in range(weight.ndim) if not (self.per_channel and each == axis)]
        top = weight.abs().amax(axes, keepdim=True)
        # 2^k stands for up to 3/2 of it. A channel of zeros has no exponent; any will do.
        largest = torch.where(top > 0, torch.floor(torch.log2(top * (4 / 3))), 0.0)
        return PowerOfTwoQuantizer(largest, 2 ** (self.weight_bits - 1) - 1)

    def input_quantizer(self, seen: Histogram) -> nn.Module | None:
        from hasten.passes.quantization.fake import LogarithmicQuantizer

        if self.activation_bits is None:
            return None
        low, high = seen.range(self.activation_ranges, percentile=self.percentile)
        return LogarithmicQuantizer(low, high, self.activation_bits)
