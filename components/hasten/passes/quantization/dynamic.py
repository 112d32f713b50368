"""8-bit weights, and activations whose ranges are measured anew in every request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, GraphPass
from hasten.core.processor import has_vnni


@dataclass(frozen=True, kw_only=True)
class DynamicQuantization(GraphPass):
    """Integer products of 8-bit weights and of activations that are quantized when they are known; needs no rows.

    What the ranges cost in every request pays off where weights are large and rows few: linear layers of transformers,
    recurrent layers. It is ONNX Runtime's own technique; other engines fuse none of it.

    Attributes:
        operators: ONNX operators whose constant weights are quantized. `Conv` gets smaller and no faster; `Gather`, the
            tables of embeddings, gets smaller and is turned back into floats row by row.
        per_channel: one weight scale per output channel instead of one per tensor, where the operator can.
        weights: `s8` (with sign), `s7` (of 7 bits) or `u8`. Processors without VNNI add pairs of products in 16 bits,
            which saturate with `s8`; `s7` can't, nor `u8`, whose kernels are slower. `auto`: `s8` with VNNI, else `s7`.
    """

    relieves = ("compute", "memory", "capacity")
    never_with = ("engine=eager", "engine=inductor", "engine=openvino", "engine=hls")
    calibration_rows = 0

    operators: tuple[Literal["MatMul", "Gemm", "LSTM", "Conv", "Gather"], ...] = ("MatMul", "Gemm", "LSTM")
    per_channel: bool = True
    weights: Literal["auto", "s8", "s7", "u8"] = "auto"

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path) -> tuple[str, ...]:
        if family != "onnxruntime":
            raise PassError(f"quantization=dynamic is for onnxruntime, not for {family}: choose engine=onnxruntime")
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        from hasten.artefacts.capture import write_onnx
        from hasten.passes.quantization.onnxruntime import quiet

        narrow = self.weights == "s7" or (self.weights == "auto" and not has_vnni())
        integers = onnx.TensorProto.UINT8 if self.weights == "u8" else onnx.TensorProto.INT8
        with TemporaryDirectory() as scratch, quiet():
            quantized = Path(scratch, "quantized.onnx")
            try:
                quantize_dynamic(
                    onnx.load(graph.onnx),
                    quantized,
                    op_types_to_quantize=list(self.operators),
                    per_channel=self.per_channel,
                    reduce_range=narrow,
                    weight_type=QuantType.QUInt8 if self.weights == "u8" else QuantType.QInt8,
                )
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                raise PassError(
                    f"quantization=dynamic: onnxruntime.quantization refused the graph: {reason}"
                ) from error
            model = onnx.load(quantized)
        if all(weight.data_type != integers or not weight.dims for weight in model.graph.initializer):
            raise PassError(
                f"quantization=dynamic: the graph has no constant weights in {', '.join(self.operators)} "
                "(quantization.operators)"
            )
        write_onnx(model, folder / "model.onnx")
        return ()

    def integer_share(self, graph: Graph) -> float:
        import onnx

        from hasten.artefacts.operators import kind

        model = onnx.load(graph.onnx, load_external_data=False)
        weights = {each.name for each in model.graph.initializer if len(each.dims) > 1}
        read = [node.op_type for node in model.graph.node if weights.intersection(node.input)]
        layers = [operator for operator in read if kind(operator) in ("convolution", "linear")]
        return sum(operator in self.operators for operator in layers) / len(layers) if layers else 0.0
