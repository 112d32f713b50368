"""8-bit weights and activations, with activation ranges measured once, on training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, GraphPass
from hasten.core.processor import has_vnni


@dataclass(frozen=True, kw_only=True)
class StaticQuantization(GraphPass):
    """Unsigned 8-bit activations, signed weights, 32-bit sums.

    The quantize/dequantize pairs go where the engine fuses them. OpenVINO fuses what torchao's X86 quantizer annotates;
    ONNX Runtime fuses what its own tool places, and leaves much of torchao's graph in floats.

    Attributes:
        calibration_rows: that the ranges are measured on, spread evenly over the given ones; all, if there are fewer.
        per_channel: one weight scale per output channel instead of one per tensor.
        reduce_range: 7-bit weights, which can't saturate the 16-bit sums of processors without VNNI. None: there only.
    """

    relieves = ("compute", "memory", "capacity")

    calibration_rows: Annotated[int, Ge(1)] = 256
    per_channel: bool = True
    reduce_range: bool | None = None

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path) -> tuple[str, ...]:
        available = len(next(iter(calibration.values()), ()))
        if not available:
            raise PassError("quantization=static needs training rows to measure ranges on, got 0")
        order = _spread(available, self.calibration_rows)
        rows = {name: values[order] for name, values in calibration.items()}
        reduce_range = not has_vnni() if self.reduce_range is None else self.reduce_range
        file = folder / "model.onnx"
        if family == "onnxruntime":
            from hasten.passes.quantization import onnxruntime

            onnxruntime.place(graph, rows, self.per_channel, reduce_range, file)
        elif family == "openvino":
            from hasten.passes.quantization import openvino

            openvino.place(graph, rows, self.per_channel, reduce_range, file)
        else:
            raise PassError(
                f"quantization=static can be placed for onnxruntime and openvino, not for {family}: "
                "choose engine=onnxruntime or engine=openvino"
            )
        return ()


def _spread(available: int, wanted: int) -> NDArray[np.int64]:
    """Indices of at most `wanted` rows, evenly spaced, so that rows sorted by label are all represented."""
    return np.linspace(0, available - 1, min(available, wanted)).round().astype(np.int64)
