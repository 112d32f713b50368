"""Weights and activations of any width from 2 to 16 bits, calibrated, and trained through the rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Interval

from hasten.core.errors import PassError
from hasten.core.files import read_json
from hasten.core.interfaces import Bench, Columns, Graph, TrainedGraphPass
from hasten.core.processor import has_vnni
from hasten.passes.quantization.placement import Placement
from hasten.passes.quantization.ranges import Histogram, Method, channel_ranges

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hasten.passes.quantization.widths import Simulation

_SIGNED = "tensorrt"
"""The engine family whose activations have a sign and no zero point."""
_PLACED = ("onnxruntime", "openvino", _SIGNED)
_REDUCED_BITS = 7
_REFERENCE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class AffineQuantization(TrainedGraphPass):
    """Affine quantization of the inputs and weights of convolutions and linear layers, with training where declared.

    Without epochs in `quantization.training` this is post-training quantization; with them it is quantization-aware
    training that starts from there, with the recipe's distillation loss where one is declared. Batch normalization is
    trained on and its statistics are estimated anew at the end (Nagel et al. 2022): with a weight scale for every
    channel, folding it into the quantized weights changes their scales alone. Freezing the statistics for the last part
    instead cost a small CNN on digits 1 to 9 points at 2 bits, because weights that jump between levels move the means;
    estimated anew, it was within a point of its training at 2 to 4 bits.

    For the engine `hls` the ranges of activations are those that fixed point has: from zero up where nothing is
    negative, else symmetric; an FPGA multiplies any width as it is.

    Where both widths are 8 and the engine is ONNX Runtime, OpenVINO or TensorRT, the weights are placed as the integers
    that the engine runs, and the ranges of activations are measured anew on the trained network. All else is simulated:
    an ONNX graph of floats that gives exactly what these widths give.

    Attributes:
        weight_bits: of each weight.
        activation_bits: of what goes into each layer; None: only the weights are quantized.
        per_channel: a range for the weights of every output channel instead of one per layer. Without it, placed
            weights are rounded once more, to the range that they have after batch normalization is folded into them.
        symmetric: ranges of activations with zero in the middle; where integers are placed, only in training, and for
            TensorRT, which has no others, always. Those of weights always are.
        weight_ranges: how they are chosen; see `ranges.Histogram.range`.
        activation_ranges: the same, on the calibration rows.
        percentile: share of the values inside of the range, in percent, where ranges are percentiles.
        calibration_rows: training rows that ranges are measured on.
        keep: layers that stay float: `first`, `last` (as they run), or the dotted path of a layer or a block of them.
        bias_correction: take back the mean that quantization adds to the outputs of every layer (Nagel et al. 2019).
        learned_ranges: train the ranges, too; of no effect without training.
    """

    relieves: ClassVar[tuple[str, ...]] = ("compute", "memory", "capacity")
    never_with: ClassVar[tuple[str, ...]] = ("engine=eager", "engine=inductor")

    weight_bits: Annotated[int, Interval(ge=2, le=16)] = 8
    activation_bits: Annotated[int, Interval(ge=2, le=16)] | None = 8
    per_channel: bool = True
    symmetric: bool = False
    weight_ranges: Method = "mse"
    activation_ranges: Method = "mse"
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    calibration_rows: Annotated[int, Ge(1)] = 256
    keep: tuple[str, ...] = ()
    bias_correction: bool = True
    learned_ranges: bool = True

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path, bench: Bench) -> tuple[str, ...]:
        from hasten.passes.quantization.widths import check_family, simulate

        check_family(family)
        rows = {name: values[: self.calibration_rows] for name, values in calibration.items()}
        placed = self._placed(family)
        if placed and family == _SIGNED and not self.symmetric:
            raise PassError(f"{family} has no zero points: train without them (quantization.symmetric=true)")
        scheme = _Affine(
            knobs=self,
            largest_weight=_largest_weight(family) if placed else None,
            fixed_point=family == "hls",
        )
        simulation = simulate(
            scheme,
            graph,
            rows,
            bench,
            keep=self.keep,
            bias_correction=self.bias_correction,
            others="are left to the engine's placement" if placed else "stay in floats",
        )
        file = folder / "model.onnx"
        if placed:
            self._place(simulation, graph, rows, family, file)
            return simulation.notes
        simulation.write(graph, file)
        inputs = "" if self.activation_bits is None else f" and activations at {self.activation_bits} bits"
        if family == "hls":
            return (
                f"weights at {self.weight_bits} bits{inputs}, which the FPGA multiplies as they are",
                *simulation.notes,
            )
        return (
            f"weights at {self.weight_bits} bits{inputs} are simulated in 32-bit floats: no engine here runs these "
            f"widths; {simulation.cost(self.weight_bits, file)}",
            *simulation.notes,
        )

    def _placed(self, family: str) -> bool:
        return self.weight_bits == self.activation_bits == 8 and family in _PLACED

    def _place(self, simulation: Simulation, graph: Graph, rows: Columns, family: str, file: Path) -> None:
        """Writes the graph in integers, of the weights as they were trained."""
        from hasten.artefacts.capture import write_graph
        from hasten.artefacts.module import save, surgery
        from hasten.passes.quantization.static import placer

        few = {name: values[:_REFERENCE_ROWS] for name, values in rows.items()}
        with TemporaryDirectory() as scratch:
            module, floats = Path(scratch, "module"), Path(scratch, "graph")
            for folder in (module, floats):
                folder.mkdir()
            save(module, read_json(graph.module / "module.json")["arch"], simulation.model, surgery(graph.module))
            trained = write_graph(simulation.model, module, graph.signature, few, floats)
            placer(family).place(trained, rows, self._placement(family), file)

    def _placement(self, family: str) -> Placement:
        return Placement(
            ranges=self.activation_ranges,
            percentile=self.percentile,
            per_channel=self.per_channel,
            weights="s8" if has_vnni() or family == _SIGNED else "s7",
            keep=self.keep,
        )


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """The fake quantizers of an `AffineQuantization`.

    Attributes:
        largest_weight: integer of the largest weight, where an engine leaves less than its bits allow.
        fixed_point: whether ranges have to begin at zero or be symmetric.
    """

    knobs: AffineQuantization
    largest_weight: int | None
    fixed_point: bool = False

    def weight_quantizer(self, weight: Tensor, axis: int) -> nn.Module:
        from hasten.passes.quantization.fake import affine_quantizer

        knobs = self.knobs
        low, high = channel_ranges(
            weight.numpy(),
            knobs.weight_ranges,
            knobs.weight_bits if self.largest_weight is None else _REDUCED_BITS,
            axis=axis if knobs.per_channel else None,
            percentile=knobs.percentile,
        )
        shape = [1] * weight.ndim
        shape[axis] = len(high)
        return affine_quantizer(
            low,
            high,
            knobs.weight_bits,
            symmetric=True,
            shape=tuple(shape),
            last=self.largest_weight,
            learned=knobs.learned_ranges,
        )

    def input_quantizer(self, seen: Histogram) -> nn.Module | None:
        from hasten.passes.quantization.fake import affine_quantizer

        knobs = self.knobs
        if knobs.activation_bits is None:
            return None
        symmetric = seen.low < 0 if self.fixed_point else knobs.symmetric
        low, high = seen.range(
            knobs.activation_ranges, knobs.activation_bits, symmetric=symmetric, percentile=knobs.percentile
        )
        return affine_quantizer(low, high, knobs.activation_bits, symmetric=symmetric, learned=knobs.learned_ranges)


def _largest_weight(family: str) -> int | None:
    """Without VNNI the placers take seven bits, so that 16-bit sums can't saturate."""
    return None if has_vnni() else {"onnxruntime": 64, "openvino": 63}.get(family)
