"""Static quantization placed for ONNX Runtime: its own tool on the float ONNX graph."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxruntime.quantization.registry import QDQRegistry

from hasten.artefacts.capture import INPUT, write_onnx
from hasten.core.errors import PassError
from hasten.core.interfaces import Graph

_BATCH = 32


def place(graph: Graph, rows: NDArray[np.float32], per_channel: bool, reduce_range: bool, file: Path) -> None:
    """Writes the graph with quantize/dequantize pairs around everything that ONNX Runtime can run in integers.

    Activations are unsigned: signed ones leave half of the convolutions and all residual adds in floats (1.32).
    The tool's pre-processing changes nothing, as the captured graph comes with folded batch norms; the graph is marked
    as pre-processed, because the tool otherwise sets up the root logger to recommend it.

    Raises:
        PassError: the tool refused the graph.
    """
    model = onnx.load(graph.onnx)
    add_pre_process_metadata(model)
    with TemporaryDirectory() as scratch:
        quantized = Path(scratch, "quantized.onnx")
        try:
            quantize_static(
                model,
                quantized,
                _Batches(rows),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(QDQRegistry),
                per_channel=per_channel,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise PassError(f"quantization=static: onnxruntime.quantization refused the graph: {reason}") from error
        write_onnx(onnx.load(quantized), file)


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Rows in the form that the calibrator reads."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._batches = iter([rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: np.ascontiguousarray(batch, dtype=np.float32)}
