"""8-bit weights and activations, with activation ranges measured once, on training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Interval

from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, GraphPass
from hasten.core.processor import has_vnni
from hasten.passes.quantization.placement import Placement, Weights, relative_error
from hasten.passes.quantization.ranges import Method

_SLOWER = 2.0
"""How much nearer to the floats the slower kernels of unsigned weights have to be: they take up to twice as long."""


@dataclass(frozen=True, kw_only=True)
class StaticQuantization(GraphPass):
    """8-bit activations, 8-bit weights, 32-bit sums.

    The quantize/dequantize pairs go where the engine fuses them. OpenVINO fuses what torchao's X86 quantizer annotates;
    ONNX Runtime fuses what its own tool places, and leaves much of torchao's graph in floats. TensorRT has signed
    activations alone, and adds the residual within the convolution where the pair is on the residual.

    Attributes:
        calibration_rows: that ranges and errors are measured on, spread evenly over the given ones; all, if there are
            fewer.
        ranges: of activations: `minmax` of what was seen, a `percentile` of it, or those of the least squared error
            (`mse`) or divergence (`entropy`).
        percentile: share of the activations inside of their range, in percent, for `ranges=percentile`.
        per_channel: one weight scale per output channel instead of one per tensor.
        weights: `s8` (with sign), `s7` (of 7 bits) or `u8` (ONNX Runtime alone). Processors without VNNI add pairs of
            products in 16 bits, which saturate with `s8`; `s7` can't, nor `u8`, whose kernels are slower. `auto` is
            `s8` with VNNI; without, those whose outputs in the engine are nearest to the floats' on the calibration
            rows, where `u8` has to halve the error.
        keep: layers that stay float: `first`, `last`, or paths of modules.
        bias_correction: shift biases by the mean error that quantized weights make on the calibration rows.
        equalize: share the range of the weights between consecutive layers with ReLU between them.
    """

    relieves = ("compute", "memory", "capacity")
    never_with = ("engine=hls",)

    calibration_rows: Annotated[int, Ge(1)] = 256
    ranges: Method = "minmax"
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    per_channel: bool = True
    weights: Literal["auto", "s8", "s7", "u8"] = "auto"
    keep: tuple[str, ...] = ()
    bias_correction: bool = False
    equalize: bool = False

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path) -> tuple[str, ...]:
        rows = spread(calibration, self.calibration_rows, "static")
        engine = placer(family)
        with TemporaryDirectory(prefix="hasten-") as scratch:
            tried, notes = {}, {}
            for weights in self._candidates(engine):
                (place := Path(scratch, weights)).mkdir()
                tried[weights] = place / "model.onnx"
                notes[weights] = self._place(graph, rows, weights, engine, place)
            chosen, why = self._nearest(tried, graph, rows, engine)
            tried[chosen].replace(folder / "model.onnx")
        return (*notes[chosen], *why)

    def _candidates(self, engine: Any) -> tuple[Weights, ...]:
        if self.weights != "auto":
            return (self.weights,)
        return ("s8",) if has_vnni() else engine.WITHOUT_VNNI

    def _place(self, graph: Graph, rows: Columns, weights: Weights, engine: Any, folder: Path) -> tuple[str, ...]:
        """Writes `model.onnx` with weights of that type; says what was done to the float weights before."""
        placement = Placement(
            ranges=self.ranges,
            percentile=self.percentile,
            per_channel=self.per_channel,
            weights=weights,
            keep=self.keep,
        )
        notes: tuple[str, ...] = ()
        if self.bias_correction or self.equalize:
            from hasten.passes.quantization.preparation import prepared

            graph, notes = prepared(
                graph, rows, placement, equalized=self.equalize, bias_corrected=self.bias_correction, folder=folder
            )
        engine.place(graph, rows, placement, folder / "model.onnx")
        return notes

    def _nearest(
        self, tried: dict[Weights, Path], graph: Graph, rows: Columns, engine: Any
    ) -> tuple[Weights, tuple[str, ...]]:
        """The type of weights whose outputs are nearest to the floats', and the figures if there was a choice."""
        first, *others = tried
        if not others:
            return first, ()
        reference = engine.outputs(graph.onnx, rows)
        errors = {weights: relative_error(engine.outputs(file, rows), reference) for weights, file in tried.items()}
        chosen = min(errors, key=lambda weights: errors[weights] * (_SLOWER if weights == "u8" else 1))
        figures = ", ".join(f"{weights} {error:.2%}" for weights, error in errors.items())
        return chosen, (f"weights={chosen}, whose outputs on {len(reference)} calibration rows are nearest: {figures}",)


def placer(family: str) -> Any:
    """The module that places the pairs for an engine family, and runs its engine.

    Raises:
        PassError: there is none.
    """
    if family == "onnxruntime":
        from hasten.passes.quantization import onnxruntime

        return onnxruntime
    if family == "openvino":
        from hasten.passes.quantization import openvino

        return openvino
    if family == "tensorrt":
        from hasten.passes.quantization import tensorrt

        return tensorrt
    raise PassError(
        f"quantization=static can be placed for onnxruntime, openvino and tensorrt, not for {family}: "
        "choose engine=onnxruntime or engine=openvino"
    )


def spread(rows: Columns, wanted: int, option: str) -> Columns:
    """At most `wanted` of the rows, evenly spaced, so that rows sorted by label are all represented.

    Raises:
        PassError: there are none, named by the option of the group `quantization` that needs them.
    """
    available = len(next(iter(rows.values()), ()))
    if not available:
        raise PassError(f"quantization={option} needs training rows to measure ranges on, got 0")
    order = np.linspace(0, available - 1, min(available, wanted)).round().astype(np.int64)
    return {name: values[order] for name, values in rows.items()}
