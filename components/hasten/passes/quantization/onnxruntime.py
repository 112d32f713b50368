"""Static quantization placed for ONNX Runtime: its own tool on the float ONNX graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.registry import QDQRegistry

from hasten.artefacts.capture import write_onnx
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph

_BATCH = 32


def place(graph: Graph, rows: Columns, per_channel: bool, reduce_range: bool, file: Path) -> None:
    """Writes the graph with quantize/dequantize pairs around everything that ONNX Runtime can run in integers.

    Activations are unsigned: signed ones leave half of the convolutions and all residual adds in floats (1.32).
    The pre-processing that the tool recommends changes nothing, as the captured graph comes with folded batch norms.

    Raises:
        PassError: the tool refused the graph.
    """
    with TemporaryDirectory() as scratch, quiet():
        quantized = Path(scratch, "quantized.onnx")
        try:
            quantize_static(
                onnx.load(graph.onnx),
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


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings that the tool logs at the root logger, which it would otherwise set up to do so."""
    root, nowhere = logging.getLogger(), logging.NullHandler()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root.addHandler(nowhere)
    root.addFilter(passes)
    try:
        yield
    finally:
        root.removeFilter(passes)
        root.removeHandler(nowhere)


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Rows in the form that the calibrator reads."""

    def __init__(self, rows: Columns) -> None:
        starts = range(0, len(next(iter(rows.values()))), _BATCH)
        self._batches = iter([{name: values[at : at + _BATCH] for name, values in rows.items()} for at in starts])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)
