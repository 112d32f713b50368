"""From an ONNX graph to the layers of hls4ml, each with its fixed-point types.

hls4ml's own readers take neither a scale for every output channel of a linear layer nor activations that are quantized
by anything but powers of two, so the graph is read here. What the recipe quantized becomes integers: a convolution or
linear layer multiplies the integers of its input by those of its weights, adds them up without loss, and one multiplier
for each output brings the sum to the scale of what reads it. All else is fixed point of `bits` bits, with the binary
point where the values of the reference rows want it.

hls4ml has the channels last, ONNX has them first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.errors import EngineError
from hasten.engines.fixed_point import Fixed, exact, levels, reaching
from hasten.engines.fpga_estimate import Layer

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

SCALE_BITS = 18
"""Of the factor at the end of a quantized layer: the narrower input of a DSP48's multiplier."""
_BIAS_BITS = 24
_INPUT = "input_rows"  # hls4ml reserves `input`
_TABLES = {"Sigmoid": "sigmoid", "Tanh": "tanh"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """What hls4ml is to build.

    Attributes:
        layers: as `ModelGraph.from_layer_list` takes them.
        precisions: layer -> what it is of -> type.
        input: name of the first layer.
        output: name of the last layer.
        work: what each layer multiplies.
        weighted: convolutions and linear layers.
        quantized: those of them whose weights and inputs both have the recipe's widths.
        clipped: ranges of the recipe's that no type has and that are clipped elsewhere, one sentence each.
    """

    layers: tuple[Mapping[str, Any], ...]
    precisions: Mapping[str, Mapping[str, str]]
    input: str
    output: str
    work: tuple[Layer, ...]
    weighted: int
    quantized: int
    clipped: tuple[str, ...]


def read_network(model: onnx.ModelProto, ranges: Mapping[str, float], bits: int) -> Network:
    """Translates a graph with one input and one output.

    Args:
        ranges: tensor -> largest magnitude that it was seen with.
        bits: of what the recipe leaves in floats.

    Raises:
        EngineError: the graph has an operator or a form that can't be translated.
    """
    return _Reader(model, ranges, bits).read()


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """What a layer of hls4ml gives.

    Attributes:
        layer: its name.
        shape: of one row, channels last.
        scale: what a stored value has to be multiplied by.
        flattened: shape, channels last, of what was flattened; its order is not that of ONNX.
        quantized: whether the recipe gave it its width.
    """

    layer: str
    shape: tuple[int, ...]
    type: Fixed
    scale: float = 1.0
    flattened: tuple[int, ...] = ()
    quantized: bool = False


@dataclass(frozen=True, kw_only=True)
class _Quantizer:
    """Division, clipping, rounding and multiplication, as `quantization` writes them.

    Attributes:
        source: tensor that goes in.
        output: tensor that comes out.
        inside: tensors between the two.
    """

    source: str
    output: str
    inside: tuple[str, ...]
    step: float
    first: int
    last: int

    @property
    def stored(self) -> tuple[Fixed, float]:
        """The type and scale of what it gives: as it is where the step is a power of two, else integers."""
        signed = self.first < 0
        last = max(self.last, -self.first - (self.first != -self.last))
        width = last.bit_length() + signed
        mantissa, exponent = math.frexp(self.step)
        power = exponent - 1 if mantissa == 0.5 else 0
        symmetric = signed and self.first == -self.last
        stored = Fixed(width=width, integer=width + power, signed=signed, saturates=True, symmetric=symmetric)
        return stored, self.step / 2.0**power

    @property
    def exact(self) -> bool:
        """Whether its ends are those of the type."""
        width = self.stored[0].width
        lowest = {0} if self.first == 0 else {-self.last, -self.last - 1}
        return self.first in lowest and self.last == 2 ** (width - (self.first < 0)) - 1


@dataclass
class _Reader:
    """One walk through the graph."""

    model: onnx.ModelProto
    ranges: Mapping[str, float]
    bits: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    precisions: dict[str, dict[str, str]] = field(default_factory=dict)
    tensors: dict[str, _Tensor] = field(default_factory=dict)
    work: list[Layer] = field(default_factory=list)
    weighted: int = 0
    quantized: int = 0

    def __post_init__(self) -> None:
        from onnx import numpy_helper

        graph = self.model.graph
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        found = [self._quantizer(node) for node in graph.node if node.op_type == "Round"]
        self.quantizers = {each.output: each for each in found}
        self.done: set[str] = set()

    def read(self) -> Network:
        graph = self.model.graph
        self._start(graph.input[0])
        (wanted,) = (each.name for each in graph.output)
        for node in graph.node:
            if node.output[0] not in self.done:
                self._translate(node)
        result = self.tensors[wanted]
        if len(result.shape) > 1 or result.flattened:
            raise EngineError(f"hls gives one row of numbers, and the model's outputs have the shape {result.shape}")
        result = self._plain(wanted)
        return Network(
            layers=tuple(self.layers),
            precisions=self.precisions,
            input=_INPUT,
            output=result.layer,
            work=tuple(self.work),
            weighted=self.weighted,
            quantized=self.quantized,
            clipped=tuple(
                f"activations are clipped to the {_ends(each.stored[0])} of their type instead of "
                f"[{each.first}, {each.last}]: quantization.symmetric=true has such ends"
                for each in self.quantizers.values()
                if not each.exact
            ),
        )

    def _start(self, source: onnx.ValueInfoProto) -> None:
        shape = _channels_last([each.dim_value for each in source.type.tensor_type.shape.dim[1:]])
        self.layers.append({"class_name": "InputLayer", "name": _INPUT, "input_shape": list(shape)})
        stored = self._seen(source.name)
        self.precisions[_INPUT] = {"result": str(stored)}
        self.tensors[source.name] = _Tensor(layer=_INPUT, shape=shape, type=stored)

    def _translate(self, node: onnx.NodeProto) -> None:
        output = node.output[0]
        if any(output in each.inside for each in self.quantizers.values()):
            return  # of a quantizer, which is translated where it ends
        if output in self.quantizers:
            self._quantize(self.quantizers[output])
            return
        translate = {
            "Gemm": self._linear,
            "MatMul": self._linear,
            "Conv": self._convolution,
            "Relu": self._relu,
            "Sigmoid": self._table,
            "Tanh": self._table,
            "Add": self._add,
            "MaxPool": self._pool,
            "AveragePool": self._pool,
            "ReduceMean": self._mean,
            "GlobalAveragePool": self._mean,
            "Reshape": self._flatten,
            "Flatten": self._flatten,
            "Identity": self._same,
        }.get(node.op_type)
        if translate is None:
            raise EngineError(f"hls has no layer for the operator {node.op_type} ({node.name})")
        translate(node)

    def _quantizer(self, node: onnx.NodeProto) -> _Quantizer:
        producers = {each.output[0]: each for each in self.model.graph.node}
        clip = producers.get(node.input[0])
        divide = producers.get(clip.input[0]) if clip is not None and clip.op_type == "Clip" else None
        readers = self.readers.get(node.output[0], [])
        multiply = readers[0] if len(readers) == 1 and readers[0].op_type == "Mul" else None
        if clip is None or divide is None or multiply is None or divide.op_type != "Div":
            raise EngineError(
                f"hls does not know what is rounded by {node.name}: no quantizer of one step for all values"
            )
        step, first, last = (self.constants.get(name) for name in (divide.input[1], *clip.input[1:3]))
        if step is None or first is None or last is None or step.size != 1:
            raise EngineError(f"hls takes one range for all activations of a layer, and {node.name} has several")
        return _Quantizer(
            source=divide.input[0],
            output=multiply.output[0],
            inside=(divide.output[0], clip.output[0], node.output[0]),
            step=float(step.item()),
            first=round(float(first.item())),
            last=round(float(last.item())),
        )

    def _linear(self, node: onnx.NodeProto) -> None:
        source, weight = self.tensors[node.input[0]], self._weight(node)
        attributes = _attributes(node)
        transposed = node.op_type == "Gemm" and attributes.get("transB", 0)
        if attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1 or attributes.get("transA", 0):
            raise EngineError(f"hls takes no factors in a linear layer ({node.name})")
        if weight.ndim != 2 or len(source.shape) != 1:
            raise EngineError(f"hls takes rows of one axis in a linear layer, got {source.shape} ({node.name})")
        rows = np.asarray(weight if transposed else weight.T, np.float64)
        if source.flattened:
            rows = _to_channels_last_columns(rows, source.flattened)
        bias = self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(rows))
        output, bias = self._with_added_bias(node, bias) if node.op_type == "MatMul" else (node.output[0], bias)
        shape = {"class_name": "Dense", "n_in": rows.shape[1], "n_out": len(rows)}
        self._weighted(output, source, rows, bias, shape, lambda stored: stored.T, (len(rows),))

    def _with_added_bias(self, node: onnx.NodeProto, bias: NDArray[Any]) -> tuple[str, NDArray[Any]]:
        """A product whose only reader adds a constant to it takes that as its bias."""
        after = self.readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "Add":
            added = [self.constants[name] for name in after[0].input if name in self.constants]
            if added and added[0].size == len(bias):
                self.done.add(after[0].output[0])
                return after[0].output[0], added[0].reshape(-1)
        return node.output[0], bias

    def _convolution(self, node: onnx.NodeProto) -> None:
        source, weight, attributes = self.tensors[node.input[0]], self._weight(node), _attributes(node)
        channels, groups = source.shape[-1], attributes.get("group", 1)
        if len(source.shape) not in (2, 3) or groups not in (1, channels):
            raise EngineError(f"hls takes convolutions over one or two axes, whole or depthwise ({node.name})")
        if any(each != 1 for each in attributes.get("dilations", [1])):
            raise EngineError(f"hls takes no dilated convolution ({node.name})")
        depthwise = groups > 1
        if depthwise and len(weight) != channels:
            raise EngineError(f"hls takes one filter for each channel of a depthwise convolution ({node.name})")
        places = _places(source.shape[:-1], weight.shape[2:], attributes)
        bias = self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(weight))
        axes = len(places.out)
        kernel = weight.shape[1:]

        def stored(rows: NDArray[Any]) -> NDArray[Any]:
            return np.moveaxis(rows.reshape(len(rows), *kernel), (0, 1), (-2, -1) if depthwise else (-1, -2))

        shape = {
            "class_name": f"{'Depthwise' if depthwise else ''}Conv{axes}D",
            "n_chan": channels,
            "n_filt": len(weight),
            "data_format": "channels_last",
            **places.named("filt"),
            **({"depth_multiplier": 1} if depthwise else {}),
        }
        rows = np.asarray(weight, np.float64).reshape(len(weight), -1)
        self._weighted(node.output[0], source, rows, bias, shape, stored, (*places.out, len(weight)))

    def _weight(self, node: onnx.NodeProto) -> NDArray[Any]:
        if node.input[1] not in self.constants:
            raise EngineError(f"hls multiplies by constants, and {node.name} multiplies two activations")
        weight: NDArray[Any] = self.constants[node.input[1]]
        return weight

    def _weighted(
        self,
        output: str,
        source: _Tensor,
        rows: NDArray[np.float64],
        bias: NDArray[Any],
        shape: Mapping[str, Any],
        stored: Any,
        out_shape: tuple[int, ...],
    ) -> None:
        """A layer with weights (C, K), and what brings its sums to the scale and the type of their reader."""
        weights, weight_type, steps, on_grid = self._weights(rows)
        final, result_type, result_scale, quantized = self._reader_of(output)
        factors = source.scale * steps / result_scale
        scaled = bool((factors != 1).any())
        offsets = np.asarray(bias, np.float64) / result_scale
        bias_type = reaching(float(np.abs(offsets).max()), _BIAS_BITS)
        own_bias = np.zeros(len(rows)) if scaled else bias_type.rounded(offsets)
        sums = _sum_type(weights, weight_type, source.type, own_bias, bias_type if own_bias.any() else None)
        name = self._named("layer")
        data = "depthwise_data" if str(shape["class_name"]).startswith("Depthwise") else "weight_data"
        self._append(
            {**shape, "name": name, "inputs": [source.layer], data: stored(weights), "bias_data": own_bias},
            weight=weight_type,
            bias=bias_type,
            accum=sums,
            result=sums if scaled else result_type,
        )
        self.work.append(
            Layer(
                name=name,
                inputs=rows.shape[1],
                outputs=len(rows),
                places=math.prod(out_shape[:-1]),
                nonzero=int(np.count_nonzero(weights)),
                input_bits=source.type.width,
                weight_bits=weight_type.width,
                sum_bits=sums.width,
                scales=len(rows) if scaled else 0,
                scale_bits=SCALE_BITS,
            )
        )
        self.weighted += 1
        self.quantized += source.quantized and on_grid
        if scaled:
            name = self._scale(name, out_shape, factors, offsets, result_type)
        self.tensors[final] = _Tensor(
            layer=name, shape=out_shape, type=result_type, scale=result_scale, quantized=quantized
        )

    def _weights(self, rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], Fixed, NDArray[np.float64], bool]:
        """Stored weights, their type, the step of each channel, and whether they lie on a grid of the recipe."""
        ones = np.ones(len(rows))
        if (plain := exact(rows, self.bits)) is not None:
            return rows, plain, ones, True
        if (found := levels(rows)) is not None:
            integers, steps = found[0].astype(np.float64), found[1]
            width = int(np.abs(integers).max()).bit_length() + 1
            return integers, Fixed(width=width, integer=width), steps, True
        nearest = reaching(float(np.abs(rows).max()), self.bits)
        return nearest.rounded(rows), nearest, ones, False

    def _reader_of(self, output: str) -> tuple[str, Fixed, float, bool]:
        """What the sums of a layer are rounded to: name of the tensor, its type and scale, and whether it is quantized.

        Where a quantizer is all that reads them, they are rounded once, by it; a ReLU before a quantizer without
        negative numbers is its lower end.
        """
        name, after = output, self.readers.get(output, [])
        rectified = len(after) == 1 and after[0].op_type == "Relu"
        if rectified:
            name = after[0].output[0]
        found = [each for each in self.quantizers.values() if each.source == name]
        if found and len(self.readers[name]) == 1 and (not rectified or found[0].first == 0):
            stored, scale = found[0].stored
            self.done |= {name, found[0].output} - {output}
            return found[0].output, stored, scale, True
        return output, self._seen(output), 1.0, False

    def _scale(
        self, source: str, shape: tuple[int, ...], factors: NDArray[Any], offsets: NDArray[Any], result: Fixed
    ) -> str:
        """A layer that multiplies each channel by its factor, adds its offset, and rounds."""
        name = self._named("scale")
        types = reaching(float(factors.max()), SCALE_BITS), reaching(float(np.abs(offsets).max()), _BIAS_BITS)
        self._append(
            {
                "class_name": "ApplyAlpha",
                "name": name,
                "inputs": [source],
                "n_in": math.prod(shape),
                "n_filt": shape[-1] if len(shape) > 1 else -1,
                "scale_data": types[0].rounded(factors),
                "bias_data": types[1].rounded(offsets),
            },
            scale=types[0],
            bias=types[1],
            result=result,
        )
        return name

    def _quantize(self, quantizer: _Quantizer) -> None:
        source = self.tensors[quantizer.source]
        stored, scale = quantizer.stored
        name = self._converted(source, source.scale / scale, stored)
        self.tensors[quantizer.output] = replace(source, layer=name, type=stored, scale=scale, quantized=True)

    def _plain(self, tensor: str) -> _Tensor:
        """The tensor at scale 1."""
        source = self.tensors[tensor]
        if source.scale == 1:
            return source
        stored = self._seen(tensor)
        return replace(source, layer=self._converted(source, source.scale, stored), type=stored, scale=1.0)

    def _converted(self, source: _Tensor, factor: float, stored: Fixed) -> str:
        """Name of a layer that gives the values times a factor in another type."""
        if factor != 1:
            channels = source.shape[-1]
            name = self._scale(source.layer, source.shape, np.full(channels, factor), np.zeros(channels), stored)
            self.work.append(
                Layer(
                    name=name,
                    inputs=1,
                    outputs=channels,
                    places=math.prod(source.shape[:-1]),
                    nonzero=channels,
                    input_bits=source.type.width,
                    weight_bits=SCALE_BITS,
                    sum_bits=source.type.width + SCALE_BITS,
                    scales=0,
                    scale_bits=SCALE_BITS,
                )
            )
            return name
        name = self._named("round")
        self._append(
            {"class_name": "Activation", "activation": "linear", "name": name, "inputs": [source.layer]}, result=stored
        )
        return name

    def _relu(self, node: onnx.NodeProto) -> None:
        source, name = self.tensors[node.input[0]], self._named("relu")
        before = source.type
        after = replace(before, width=before.width - 1, integer=before.integer - 1, signed=False, symmetric=False)
        stored = after if before.signed else before
        self._append(
            {"class_name": "Activation", "activation": "relu", "name": name, "inputs": [source.layer]}, result=stored
        )
        self.tensors[node.output[0]] = replace(source, layer=name, type=stored)

    def _table(self, node: onnx.NodeProto) -> None:
        """By hls4ml's table of 1024 values in [-8, 8)."""
        source, name = self._plain(node.input[0]), self._named(node.op_type.lower())
        stored = self._seen(node.output[0])
        activation = _TABLES[node.op_type]
        self._append(
            {"class_name": "Activation", "activation": activation, "name": name, "inputs": [source.layer]},
            result=stored,
            table=Fixed(width=SCALE_BITS, integer=2),
        )
        self.tensors[node.output[0]] = replace(source, layer=name, type=stored, quantized=False)

    def _add(self, node: onnx.NodeProto) -> None:
        if any(name in self.constants for name in node.input):
            raise EngineError(f"hls adds constants as biases of a layer alone ({node.name})")
        left, right = (self._plain(name) for name in node.input)
        if left.shape != right.shape or left.flattened != right.flattened:
            raise EngineError(f"hls adds tensors of one shape, got {left.shape} and {right.shape} ({node.name})")
        name, stored = self._named("add"), self._seen(node.output[0])
        self._append(
            {"class_name": "Merge", "op": "add", "name": name, "inputs": [left.layer, right.layer]}, result=stored
        )
        self.tensors[node.output[0]] = replace(left, layer=name, type=stored, quantized=False)

    def _pool(self, node: onnx.NodeProto) -> None:
        source, attributes = self.tensors[node.input[0]], _attributes(node)
        kind = node.op_type.removesuffix("Pool")
        places = _places(source.shape[:-1], attributes["kernel_shape"], attributes)
        if attributes.get("ceil_mode", 0):
            raise EngineError(f"hls takes no pooling that is rounded up ({node.name})")
        axes, name = len(places.out), self._named("pool")
        size = (
            {"n_in": source.shape[0], "n_out": places.out[0]}
            if axes == 1
            else {"in_height": source.shape[0], "in_width": source.shape[1]}
        )
        named = {
            key: value
            for key, value in places.named("pool").items()
            if axes == 2 or key not in ("in_width", "out_width")
        }
        stored = source.type if kind == "Max" else self._averaged(source)
        self._append(
            {
                "class_name": f"{kind}Pooling{axes}D",
                "name": name,
                "inputs": [source.layer],
                "n_filt": source.shape[-1],
                "data_format": "channels_last",
                "count_pad": bool(attributes.get("count_include_pad", 0)),
                **named,
                **size,
            },
            result=stored,
            accum=_of_sum(source.type, math.prod(attributes["kernel_shape"])),
        )
        shape = (*places.out, source.shape[-1])
        self.tensors[node.output[0]] = replace(source, layer=name, shape=shape, type=stored)

    def _mean(self, node: onnx.NodeProto) -> None:
        source = self.tensors[node.input[0]]
        *places, channels = source.shape
        self._check_mean(node, len(places))
        name, stored = self._named("mean"), self._averaged(source)
        size = {"n_in": places[0]} if len(places) == 1 else {"in_height": places[0], "in_width": places[1]}
        self._append(
            {
                "class_name": f"GlobalAveragePooling{len(places)}D",
                "name": name,
                "inputs": [source.layer],
                "n_filt": channels,
                "data_format": "channels_last",
                "keepdims": False,
                **size,
            },
            result=stored,
            accum=_of_sum(source.type, math.prod(places)),
        )
        self.tensors[node.output[0]] = replace(source, layer=name, shape=(channels,), type=stored, quantized=False)

    def _check_mean(self, node: onnx.NodeProto, axes: int) -> None:
        if node.op_type == "GlobalAveragePool":
            return
        given = self.constants[node.input[1]].tolist() if len(node.input) > 1 else _attributes(node).get("axes", [])
        if axes not in (1, 2) or sorted(each % (axes + 2) for each in given) != list(range(2, axes + 2)):
            raise EngineError(f"hls averages over all places at once, and {node.name} over the axes {given}")

    def _averaged(self, source: _Tensor) -> Fixed:
        """A mean lies within the range of what it is of, and wants a finer step."""
        return replace(source.type, width=max(self.bits, source.type.width), saturates=True, symmetric=False)

    def _flatten(self, node: onnx.NodeProto) -> None:
        source = self.tensors[node.input[0]]
        if len(source.shape) == 1:  # pooled: (C, 1, 1) of ONNX is (C,) here
            self.tensors[node.output[0]] = source
            return
        if node.op_type == "Reshape" and self._target_rank(node) != 2:
            raise EngineError(f"hls flattens whole rows, and {node.name} gives them another shape")
        name, size = self._named("flatten"), math.prod(source.shape)
        self._append(
            {"class_name": "Reshape", "name": name, "inputs": [source.layer], "target_shape": [size]},
            result=source.type,
        )
        self.tensors[node.output[0]] = replace(source, layer=name, shape=(size,), flattened=source.shape)

    def _target_rank(self, node: onnx.NodeProto) -> int:
        shape = self.constants.get(node.input[1])
        return -1 if shape is None else int(shape.size)

    def _same(self, node: onnx.NodeProto) -> None:
        self.tensors[node.output[0]] = self.tensors[node.input[0]]

    def _seen(self, tensor: str) -> Fixed:
        """The type of what stays in floats: twice what was seen of it fits."""
        return reaching(2 * self.ranges[tensor], self.bits, saturates=True)

    def _named(self, kind: str) -> str:
        return f"{kind}{sum(each['name'].startswith(kind) for each in self.layers)}"

    def _append(self, layer: dict[str, Any], **types: Fixed) -> None:
        self.layers.append(layer)
        self.precisions[layer["name"]] = {name: str(each) for name, each in types.items()}


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where a window goes, axis by axis: height and width, or width alone."""

    given: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    out: tuple[int, ...]

    def named(self, window: str) -> dict[str, int]:
        """As hls4ml names them."""
        names = ("height", "width")[-len(self.out) :]
        ends = {"height": ("top", "bottom"), "width": ("left", "right")}
        found: dict[str, int] = {}
        for axis, name in enumerate(names):
            found |= {
                f"in_{name}": self.given[axis],
                f"out_{name}": self.out[axis],
                f"{window}_{name}": self.window[axis],
                f"stride_{name}": self.stride[axis],
                f"pad_{ends[name][0]}": self.before[axis],
                f"pad_{ends[name][1]}": self.after[axis],
            }
        return found


def _places(given: Sequence[int], window: Sequence[int], attributes: Mapping[str, Any]) -> _Places:
    axes = len(given)
    stride = tuple(attributes.get("strides", [1] * axes))
    pads = attributes.get("pads", [0] * 2 * axes)
    before, after = tuple(pads[:axes]), tuple(pads[axes:])
    sizes = zip(given, window, stride, before, after, strict=True)
    out = tuple((size + first + last - wide) // step + 1 for size, wide, step, first, last in sizes)
    return _Places(given=tuple(given), window=tuple(window), stride=stride, before=before, after=after, out=out)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[1:], shape[0])


def _to_channels_last_columns(rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Columns that count (C, H, W) in the order of (H, W, C)."""
    *places, channels = shape
    return np.moveaxis(rows.reshape(len(rows), channels, *places), 1, -1).reshape(len(rows), -1)


def _sum_type(
    weights: NDArray[np.float64], weight: Fixed, source: Fixed, bias: NDArray[np.float64], bias_type: Fixed | None
) -> Fixed:
    """The narrowest type in which no input can make a sum overflow, whatever the order of its terms."""
    fraction = max(weight.fraction + source.fraction, bias_type.fraction if bias_type else -(2**31))
    bound = float((np.abs(weights).sum(1) * source.largest + np.abs(bias)).max())
    integer = reaching(bound, 1).integer
    return Fixed(width=max(integer + fraction, 2), integer=max(integer, 2 - fraction))


def _of_sum(each: Fixed, number: int) -> Fixed:
    more = math.ceil(math.log2(number)) if number > 1 else 0
    return Fixed(width=each.width + more, integer=each.integer + more, signed=each.signed)


def _ends(stored: Fixed) -> str:
    last = 2 ** (stored.width - stored.signed) - 1
    return f"ends [{-last - 1 if stored.signed else 0}, {last}]"
