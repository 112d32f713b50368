"""Weights of 8 or 4 bits that are turned back into floats where they are used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Columns, Graph, GraphPass

if TYPE_CHECKING:
    import onnx

_PLACES = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
"""Operator -> which of its inputs the weight is."""
_OPSET, _IR_VERSION = 21, 10
"""The first with 4-bit integers and scales of groups."""
_BLOCKS, _INTEGER_ACTIVATIONS = (16, 128), 4
"""ONNX Runtime's MatMulNBits: the least and the most inputs of a block that is no group, and its fastest arithmetic."""


@dataclass(frozen=True, kw_only=True)
class WeightOnlyQuantization(GraphPass):
    """Stores weights as integers with a scale for each output channel, or for each group of its inputs.

    A weight w is stored as round(w / scale), where the largest of its group takes the last integer (round to nearest).
    Both engines read the weights of linear layers as they are stored; how they multiply is theirs to decide, and with
    8-bit activations they may. Convolutions are turned back into floats: they save space on disk, and time nowhere.

    Attributes:
        bits: of the weights of linear layers; those of convolutions and tables have 8.
        group_size: inputs of a linear layer that share a scale, a power of 2; where it does not divide the inputs, and
            for null, all inputs of a channel share one.
        operators: ONNX operators whose constant weights are stored so. `Gather` reads the tables of embeddings.
    """

    relieves = ("memory", "capacity")
    never_with = ("engine=eager", "engine=inductor", "engine=hls")
    calibration_rows = 0

    bits: Literal[8, 4] = 8
    group_size: Annotated[int, Ge(16)] | None = None
    operators: tuple[Literal["MatMul", "Gemm", "Conv", "Gather"], ...] = ("MatMul", "Gemm", "Conv", "Gather")

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise ConfigError(
                f"group_size must be a power of 2 or null, got {self.group_size} (quantization.group_size)"
            )

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path) -> tuple[str, ...]:
        if family not in ("onnxruntime", "openvino"):
            raise PassError(
                f"quantization=weight_only is for onnxruntime and openvino, not for {family}: "
                "choose engine=onnxruntime or engine=openvino"
            )
        import onnx

        from hasten.artefacts.capture import write_onnx

        model = onnx.load(graph.onnx)
        packed = family == "onnxruntime"
        if packed:
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        elif self.bits == 4 or self.group_size:
            model = onnx.version_converter.convert_version(model, _OPSET)
            model.ir_version = max(model.ir_version, _IR_VERSION)
        stored = _Stored(model, self, packed)
        stored.rewrite()
        if not stored.names:
            raise PassError(
                f"quantization=weight_only: the graph has no constant weights in {', '.join(self.operators)} "
                "(quantization.operators)"
            )
        write_onnx(model, folder / "model.onnx")
        share = (folder / "model.onnx").stat().st_size / graph.onnx.stat().st_size
        return (f"{len(stored.names)} weights are stored as integers: the graph has {share:.0%} of its bytes",)


class _Stored:
    """A model whose weights are replaced by integers, one node after the other.

    Args:
        packed: linear layers become ONNX Runtime's MatMulNBits. It makes them of a MatMul with dequantized weights by
            itself (1.32), but not where a bias or ReLU follows, which it fuses first.
    """

    def __init__(self, model: onnx.ModelProto, method: WeightOnlyQuantization, packed: bool) -> None:
        from onnx import numpy_helper

        self._graph = model.graph
        self._method = method
        self._packed = packed
        self._weights = {
            each.name: numpy_helper.to_array(each)
            for each in model.graph.initializer
            if each.data_type == each.FLOAT and len(each.dims) > 1
        }
        self.names: set[str] = set()
        self._made: dict[str, str] = {}

    def rewrite(self) -> None:
        nodes = list(self._graph.node)
        del self._graph.node[:]
        for node in nodes:
            self._graph.node.extend(self._replaced(node) if self._takes(node) else [node])
        read = Counter(name for node in self._graph.node for name in node.input)
        kept = [each for each in self._graph.initializer if each.name not in self.names or read[each.name]]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _takes(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in self._method.operators:
            return False
        weight = self._weights.get(node.input[_PLACES[node.op_type]])
        if weight is None or (weight.ndim != 2 and node.op_type != "Conv"):
            return False
        settings = {each.name: each for each in node.attribute}
        if node.op_type == "Gemm":
            scaled = any(settings[name].f != 1 for name in ("alpha", "beta") if name in settings)
            return not scaled and not ("transA" in settings and settings["transA"].i != 0)
        return not (node.op_type == "Gather" and "axis" in settings and settings["axis"].i != 0)

    def _replaced(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node with what turns its weight back into floats in front of it, or behind it for a table."""
        from onnx import helper

        name = node.input[_PLACES[node.op_type]]
        weight = self._weights[name]
        self.names.add(name)
        if node.op_type == "Conv":
            restored, before = self._restored(name, weight, 8, channels=0, size=None)
            node.input[1] = restored
            return [*before, node]
        if node.op_type == "Gather":
            return self._table(node, name, weight)
        turned = any(each.name == "transB" and each.i for each in node.attribute)
        weight = weight.T if turned else weight
        if self._packed:
            return [self._multiplied(node, name, weight)]
        restored, before = self._restored(name, weight, self._method.bits, 1, self._group_size(len(weight)))
        if len(node.input) < 3:
            return [*before, helper.make_node("MatMul", [node.input[0], restored], node.output)]
        product = f"{node.output[0]}_product"  # OpenVINO reads integers in a MatMul alone
        multiply = helper.make_node("MatMul", [node.input[0], restored], [product])
        return [*before, multiply, helper.make_node("Add", [product, node.input[2]], node.output)]

    def _multiplied(self, node: onnx.NodeProto, name: str, weight: NDArray[Any]) -> onnx.NodeProto:
        """The linear layer as a MatMulNBits.

        Args:
            weight: (inputs, outputs).
        """
        from onnx import helper

        inputs, outputs = weight.shape
        bits, least, most = self._method.bits, *_BLOCKS
        # Blocks that divide the inputs need no padding: their greatest factor that is a power of 2.
        block = self._method.group_size or max(least, min(most, inputs & -inputs))
        if f"{name}_packed" not in self._made:
            packed, scales = _packed(weight, bits, block, shared=self._group_size(inputs) is None)
            self._keep(f"{name}_packed", packed, scales, 8)
            self._made[f"{name}_packed"] = name
        read = [node.input[0], f"{name}_packed_integers", f"{name}_packed_scales"]
        bias = ["", "", node.input[2]] if len(node.input) > 2 else []  # zero points and order of inputs go before it
        sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
        return helper.make_node(
            "MatMulNBits",
            [*read, *bias],
            node.output,
            domain="com.microsoft",
            accuracy_level=_INTEGER_ACTIVATIONS,
            **sizes,
        )

    def _group_size(self, inputs: int) -> int | None:
        """How many inputs of a linear layer share a scale; None for all."""
        size = self._method.group_size
        return size if size and inputs % size == 0 else None

    def _restored(
        self, name: str, weight: NDArray[Any], bits: int, channels: int, size: int | None
    ) -> tuple[str, list[onnx.NodeProto]]:
        """Name of the floats, and the node that makes them, unless another one has made them already.

        Args:
            channels: axis of the output channels.
            size: of the groups along the first axis that share a scale; None for one scale a channel.
        """
        from onnx import helper

        restored = f"{name}_restored"
        if restored in self._made:
            return restored, []
        if size:
            integers, scales = quantized(weight.reshape(-1, size, weight.shape[1]), bits, axes=(1,))
            integers, scales = integers.reshape(weight.shape), scales[:, 0]
            settings = {"axis": 0, "block_size": size}
        else:
            others = tuple(axis for axis in range(weight.ndim) if axis != channels)
            integers, scales = quantized(weight, bits, others)
            scales, settings = scales.ravel(), {"axis": channels}
        self._keep(name, integers, scales, bits)
        self._made[restored] = name
        read = [f"{name}_integers", f"{name}_scales"]
        return restored, [helper.make_node("DequantizeLinear", read, [restored], **settings)]

    def _table(self, node: onnx.NodeProto, name: str, weight: NDArray[Any]) -> list[onnx.NodeProto]:
        """Rows are looked up as integers, and only those that were are turned back into floats."""
        from onnx import TensorProto, helper

        if f"{name}_rows" not in self._made:
            self._keep(f"{name}_rows", *quantized(weight, 8, axes=(1,)), 8)
            self._made[f"{name}_rows"] = name
        ids, output = node.input[1], node.output[0]
        return [
            helper.make_node("Gather", [f"{name}_rows_integers", ids], [f"{output}_integers"], axis=0),
            helper.make_node("Gather", [f"{name}_rows_scales", ids], [f"{output}_scales"], axis=0),
            helper.make_node("Cast", [f"{output}_integers"], [f"{output}_floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{output}_floats", f"{output}_scales"], [output]),
        ]

    def _keep(self, name: str, integers: NDArray[Any], scales: NDArray[np.float32], bits: int) -> None:
        import ml_dtypes
        from onnx import numpy_helper

        stored = integers.astype(ml_dtypes.int4) if bits == 4 else integers
        self._graph.initializer.extend(
            [
                numpy_helper.from_array(np.ascontiguousarray(stored), f"{name}_integers"),
                numpy_helper.from_array(np.ascontiguousarray(scales), f"{name}_scales"),
            ]
        )


def quantized(weight: NDArray[Any], bits: int, axes: tuple[int, ...]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers and scales, kept as axes of size 1, of which each belongs to the weights along `axes`."""
    last = 2 ** (bits - 1) - 1
    scales = (np.abs(weight).max(axes, keepdims=True) / last).astype(np.float32)
    scales[scales == 0] = 1
    return np.clip(np.round(weight / scales), -last, last).astype(np.int8), scales


def _packed(
    weight: NDArray[Any], bits: int, block: int, *, shared: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Weights (inputs, outputs) as MatMulNBits reads them: (outputs, blocks, bytes), zero in the middle; and scales.

    Args:
        shared: all blocks of an output share a scale.
    """
    inputs, outputs = weight.shape
    blocks = -(-inputs // block)
    rows = np.pad(weight.T, ((0, 0), (0, blocks * block - inputs))).reshape(outputs, blocks, block)
    integers, scales = quantized(rows, bits, axes=(1, 2) if shared else (2,))
    unsigned = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[..., ::2] | unsigned[..., 1::2] << 4
    return unsigned, np.broadcast_to(scales[..., 0], (outputs, blocks)).ravel()
