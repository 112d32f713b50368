"""Static quantization placed for OpenVINO: torchao's PT2E on the captured graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from hasten.artefacts.capture import capture, quiet, to_onnx
from hasten.artefacts.module import forward, rebuild
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Signature

_BATCH = 32


def place(graph: Graph, rows: Columns, per_channel: bool, reduce_range: bool, file: Path) -> None:
    """Writes the graph with quantize/dequantize pairs where torchao's X86 quantizer puts them, which OpenVINO fuses.

    Raises:
        PassError: the module can't be captured or quantized.
    """
    module = rebuild(graph.module)
    to_onnx(quantized(module, graph.signature, rows, per_channel, reduce_range), graph.signature, file)


def quantized(
    module: torch.nn.Module,
    signature: Signature,
    rows: Columns,
    per_channel: bool,
    reduce_range: bool,
) -> ExportedProgram:
    """The captured module with its quantize/dequantize pairs and integer weights, calibrated on the rows.

    Raises:
        PassError: the module can't be captured or quantized.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

        quantizer = X86InductorQuantizer().set_global(_config(per_channel, reduce_range))
        captured = capture(module, signature).module()
        try:
            prepared = prepare_pt2e(captured, quantizer)
            with torch.no_grad():
                for start in range(0, len(next(iter(rows.values()))), _BATCH):
                    batch = {name: torch.tensor(values[start : start + _BATCH]) for name, values in rows.items()}
                    forward(prepared, batch)
            converted = convert_pt2e(prepared)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise PassError(f"quantization=static: torchao refused the graph: {reason}") from error
        return capture(converted, signature)


def _config(per_channel: bool, reduce_range: bool) -> Any:
    """torchao's default for x86, but for two things.

    Its `reduce_range` takes a bit from the activations, whose clamp the ONNX exporter drops; here it comes from the
    weights, which are constants. And its smallest scale, 2^-12, is too coarse for a channel of small weights.
    """
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=HistogramObserver,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-64 if reduce_range else -128,
        quant_max=63 if reduce_range else 127,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,  # output channels
        is_dynamic=False,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver if per_channel else MinMaxObserver,
    )
    return QuantizationConfig(activations, activations, weights, None)  # biases stay float
