"""Static quantization placed for ONNX Runtime: its own tool on the float ONNX graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry

from hasten.artefacts.capture import capture, write_onnx
from hasten.artefacts.module import rebuild
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph
from hasten.passes.quantization.layers import kept_nodes
from hasten.passes.quantization.placement import Placement, Weights, batches
from hasten.passes.quantization.ranges import Histogram

WITHOUT_VNNI: tuple[Weights, ...] = ("s7", "s8", "u8")
"""Weights that run in integers where sums of 16 bits may saturate: never with 7 bits, nor in the slower kernels of
unsigned ones; with 8 bits it depends on the weights and the activations."""
_ROWS, _OBSERVED = 32, 8
"""Rows of a request; fewer where all activations are kept at once."""


def place(graph: Graph, rows: Columns, placement: Placement, file: Path) -> None:
    """Writes the graph with quantize/dequantize pairs around everything that ONNX Runtime can run in integers.

    Activations are unsigned: signed ones leave half of the convolutions and all residual adds in floats (1.32).
    The pre-processing that the tool recommends changes nothing, as the captured graph comes with folded batch norms.

    Raises:
        PassError: the tool refused the graph, or there is no layer that is to be kept.
    """
    model = onnx.load(graph.onnx)
    keep = kept_node_names(graph, model, placement)
    with quiet():
        try:
            model = save_and_reload_model_with_shape_infer(model)
            quantizer = QDQQuantizer(
                model,
                per_channel=placement.per_channel,
                reduce_range=placement.weights == "s7",
                weight_qType=QuantType.QUInt8 if placement.weights == "u8" else QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=_ranges(model, rows, placement),
                nodes_to_quantize=[],
                nodes_to_exclude=keep,
                op_types_to_quantize=sorted(QDQRegistry),
                extra_options={"WeightSymmetric": True},  # QLinearConv takes no other zero than one for all channels
            )
            quantizer.quantize_model()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise PassError(f"quantization=static: onnxruntime.quantization refused the graph: {reason}") from error
    write_onnx(quantizer.model.model, file)


def outputs(file: Path, rows: Columns) -> NDArray[Any]:
    """What ONNX Runtime gives for the rows, with the graph optimised for this processor."""
    session = _session(file.read_bytes(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    return np.concatenate([session.run(None, batch)[0] for batch in batches(rows, _ROWS)])


def exact_outputs(file: Path, rows: Columns) -> NDArray[Any]:
    """What the graph says as it is written: integers are turned into floats where it says so, and nothing is fused."""
    session = _session(file.read_bytes(), GraphOptimizationLevel.ORT_DISABLE_ALL)
    return np.concatenate([session.run(None, batch)[0] for batch in batches(rows, _ROWS)])


def kept_node_names(graph: Graph, model: onnx.ModelProto, placement: Placement) -> list[str]:
    """Names of the nodes of the graph's ONNX model that stay float.

    Raises:
        PassError: there is no layer that is to be kept, or none of the nodes can be told by its path.
    """
    if not placement.keep:
        return []
    return kept_nodes(placement.keep, capture(rebuild(graph.module), graph.signature).module(), model)


def _ranges(model: onnx.ModelProto, rows: Columns, placement: Placement) -> TensorsData:
    """The range of every activation that the tool may quantize.

    Args:
        model: with the types of its activations.
    """
    values = _values(model)
    touched = {name for node in model.graph.node if node.op_type in QDQRegistry for name in (*node.input, *node.output)}
    floats = [name for name in values if values[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    ranges = activation_ranges(model, [name for name in floats if name in touched], rows, placement)
    return TensorsData(CalibrationMethod.MinMax, {name: tuple(map(np.float32, each)) for name, each in ranges.items()})


def activation_ranges(
    model: onnx.ModelProto, wanted: Sequence[str], rows: Columns, placement: Placement
) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value to be represented of each of these activations, as the placement estimates it.

    Args:
        model: float.
    """
    values = _values(model)
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    # ONNX Runtime finds the type of an output that has a name alone.
    observed.graph.output.extend(values.get(name, onnx.ValueInfoProto(name=name)) for name in wanted)
    session = _session(observed.SerializeToString(), GraphOptimizationLevel.ORT_DISABLE_ALL)
    histograms = {name: Histogram() for name in wanted}
    for batch in batches(rows, _OBSERVED):
        for name, found in zip(wanted, session.run(None, batch), strict=True):
            placement.observe(histograms[name], found)
    return {name: placement.range(each) for name, each in histograms.items()}


def _values(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    return {each.name: each for each in (*model.graph.input, *model.graph.value_info, *model.graph.output)}


def _session(model: bytes, level: GraphOptimizationLevel) -> InferenceSession:
    options = SessionOptions()
    options.intra_op_num_threads = 1  # the sum of floats depends on the threads
    options.graph_optimization_level = level
    options.log_severity_level = 3  # errors only
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


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
