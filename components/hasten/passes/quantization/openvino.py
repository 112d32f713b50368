"""Static quantization placed for OpenVINO: torchao's PT2E on the captured graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.fx import GraphModule

from hasten.artefacts.capture import capture, quiet, to_onnx
from hasten.artefacts.module import forward, rebuild
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Signature
from hasten.passes.quantization.layers import kept, layers
from hasten.passes.quantization.placement import Placement, Weights, batches

WITHOUT_VNNI: tuple[Weights, ...] = ("s7", "s8")
"""Weights that run in integers where sums of 16 bits may saturate: never with 7 bits."""
_ROWS = 32


def place(graph: Graph, rows: Columns, placement: Placement, file: Path) -> None:
    """Writes the graph with quantize/dequantize pairs where torchao's X86 quantizer puts them, which OpenVINO fuses.

    Raises:
        PassError: the module can't be captured or quantized, or there is no layer that is to be kept.
    """
    if placement.weights == "u8":
        raise PassError("OpenVINO runs layers with unsigned weights in floats: choose s8 or s7 (quantization.weights)")
    to_onnx(quantized(rebuild(graph.module), graph.signature, rows, placement), graph.signature, file)


def quantized(module: torch.nn.Module, signature: Signature, rows: Columns, placement: Placement) -> ExportedProgram:
    """The captured module with its quantize/dequantize pairs and integer weights, calibrated on the rows.

    Raises:
        PassError: the module can't be captured or quantized, or there is no layer that is to be kept.
    """
    captured = capture(module, signature).module()
    keep = kept(placement.keep, [layer.path for layer in layers(captured)])
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        try:
            prepared = prepare_pt2e(captured, _quantizer(placement, keep))
            with torch.no_grad():
                for batch in batches(rows, _ROWS):
                    forward(prepared, {name: torch.tensor(values) for name, values in batch.items()})
            converted = convert_pt2e(prepared)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise PassError(f"quantization=static: torchao refused the graph: {reason}") from error
        return capture(converted, signature)


def outputs(file: Path, rows: Columns) -> NDArray[Any]:
    """What OpenVINO gives for the rows, with the graph compiled for this processor."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return np.concatenate([compiled(list(batch.values()))[0] for batch in batches(rows, _ROWS)])


def _quantizer(placement: Placement, keep: frozenset[str]) -> Any:
    """torchao's quantizer for x86, which annotates no pattern that has a layer to be kept in it."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    class Quantizer(x86_inductor_quantizer.X86InductorQuantizer):  # type: ignore[misc]
        def annotate(self, model: GraphModule) -> Any:
            for layer in layers(model):
                if layer.path in keep:
                    x86_inductor_quantizer._annotate_nodes_not_quantize(layer.node)
            return super().annotate(model)

    return Quantizer().set_global(_config(placement))


def _config(placement: Placement) -> Any:
    """torchao's default for x86, but for four things.

    Its ranges are our own. Its `reduce_range` takes a bit from the activations, whose clamp the ONNX exporter drops;
    here it comes from the weights, which are constants. Its smallest scale, 2^-12, is too coarse for a channel of small
    weights. And its largest weight takes 127.5 steps, which shrinks weights that were trained on a grid of 127.
    """
    from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    from hasten.passes.quantization.observer import RangeObserver

    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=RangeObserver.with_args(placement=placement),
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=1 - 2 ** (placement.weight_bits - 1),
        quant_max=2 ** (placement.weight_bits - 1) - 1,
        qscheme=torch.per_channel_symmetric if placement.per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if placement.per_channel else None,  # output channels
        is_dynamic=False,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver if placement.per_channel else MinMaxObserver,
    )
    return QuantizationConfig(activations, activations, weights, None)  # biases stay float
