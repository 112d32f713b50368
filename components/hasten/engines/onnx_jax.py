"""An ONNX graph as a JAX function: one short function an operator, by the definitions of ONNX opset 18.

What is known while JAX traces stays in NumPy: weights, and shapes, whose unknown sizes are JAX's symbolic dimensions in
arrays of objects. So `Shape -> Gather -> Concat -> Reshape` costs nothing at run time, and one trace serves any batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.errors import EngineError

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Any]
"""Takes the inputs, None for one that is left out, and gives the output, or a tuple of them."""


def to_jax(file: Path, precision: str) -> Callable[..., Any]:
    """A function of one array an input, in their order, that gives the graph's first output.

    Args:
        precision: of the products in convolutions and linear layers, `float32` or `bfloat16`; sums are float32.

    Raises:
        EngineError: the graph has an operator, or a form of one, that is not in the table.
    """
    import jax
    import onnx

    graph = onnx.load(file).graph
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    steps = [(node, _operator(node.op_type), _attributes(node)) for node in graph.node]
    names = [each.name for each in graph.input]

    def run(*inputs: Any) -> Any:
        values: dict[str, Any] = {"": None, **weights, **dict(zip(names, inputs, strict=True))}
        for node, operator, attributes in steps:
            given = [values[name] for name in node.input]
            with jax.named_scope(node.op_type):  # by which a profile of the compiled program names its parts
                found = operator(given, {**attributes, "precision": precision})
            outputs = found if isinstance(found, tuple) else (found,)
            values.update(zip(node.output, outputs, strict=False))
        return values[graph.output[0].name]

    return run


def _operator(kind: str) -> Operator:
    if kind not in _OPERATORS:
        raise EngineError(f"xla knows no ONNX operator {kind}; it knows {', '.join(sorted(_OPERATORS))}")
    return _OPERATORS[kind]


def _attributes(node: Any) -> dict[str, Any]:
    from onnx.helper import get_attribute_value

    found = {each.name: get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _library(*values: Any) -> Any:
    """NumPy for what is known, JAX for what is not."""
    import jax.numpy

    return np if all(isinstance(value, np.ndarray) for value in values) else jax.numpy


def _ints(values: Any) -> list[Any]:
    """Sizes or places, which may be symbolic."""
    if not isinstance(values, np.ndarray):
        raise EngineError("xla needs shapes and places that don't depend on the values of a request")
    return [value if not isinstance(value, np.generic) else value.item() for value in np.atleast_1d(values)]


# Arithmetic


def _elementwise(name: str) -> Operator:
    return lambda inputs, attributes: getattr(_library(*inputs), name)(*inputs)


def _activation(function: Callable[[Any], Any]) -> Operator:
    return lambda inputs, attributes: function(inputs[0])


def _fold(name: str) -> Operator:
    """An operator of two, over any number of inputs."""
    return lambda inputs, attributes: functools.reduce(getattr(_library(*inputs), name), inputs)


def _relu(x: Any) -> Any:
    import jax

    return jax.nn.relu(x)


def _sigmoid(x: Any) -> Any:
    import jax

    return jax.nn.sigmoid(x)


def _erf(x: Any) -> Any:
    import jax

    return jax.lax.erf(x)


def _gelu(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.gelu(inputs[0], approximate=attributes.get("approximate", "none") == "tanh")


def _hard_sigmoid(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    return jnp.clip(attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5), 0, 1)


def _hard_swish(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.hard_swish(inputs[0])


def _leaky_relu(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.leaky_relu(inputs[0], attributes.get("alpha", 0.01))


def _elu(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.elu(inputs[0], attributes.get("alpha", 1.0))


def _prelu(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    return jnp.where(inputs[0] < 0, inputs[0] * inputs[1], inputs[0])


def _softplus(x: Any) -> Any:
    import jax

    return jax.nn.softplus(x)


def _clip(inputs: Sequence[Any], attributes: Attributes) -> Any:
    low, high = (*inputs[1:], None, None)[:2]
    return _library(inputs[0]).clip(inputs[0], low, high)


def _divide(inputs: Sequence[Any], attributes: Attributes) -> Any:
    """Of integers it drops the remainder; all that we have met are sizes and not negative."""
    dividend, divisor = inputs
    library = _library(dividend, divisor)
    if dividend.dtype == object or library.issubdtype(dividend.dtype, np.integer):
        return library.floor_divide(dividend, divisor)
    return library.divide(dividend, divisor)


def _where(inputs: Sequence[Any], attributes: Attributes) -> Any:
    return _library(*inputs).where(*inputs)


def _cast(inputs: Sequence[Any], attributes: Attributes) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    wanted = tensor_dtype_to_np_dtype(attributes["to"])
    keeps = inputs[0].dtype == object and np.issubdtype(wanted, np.integer)  # symbolic sizes
    return inputs[0] if keeps else inputs[0].astype(wanted)


# Convolutions and products


def _product(attributes: Attributes, *operands: Any) -> tuple[list[Any], dict[str, Any]]:
    """Operands as they are multiplied, and JAX's settings for it. TPUs would round float32 unless told not to."""
    import jax
    import jax.numpy as jnp

    if attributes["precision"] == "bfloat16":
        return [jnp.asarray(each, jnp.bfloat16) for each in operands], {"preferred_element_type": jnp.float32}
    return [jnp.asarray(each) for each in operands], {"precision": jax.lax.Precision.HIGHEST}


def _conv(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    x, weights, bias = (*inputs, None)[:3]
    spatial = weights.ndim - 2
    letters = "DHW"[-spatial:]
    strides = attributes.get("strides", [1] * spatial)
    dilations = attributes.get("dilations", [1] * spatial)
    (x, weights), settings = _product(attributes, x, weights)
    outputs = jax.lax.conv_general_dilated(
        x,
        weights,
        strides,
        _padding(attributes, x.shape[2:], weights.shape[2:], strides, dilations),
        rhs_dilation=dilations,
        dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        feature_group_count=attributes.get("group", 1),
        **settings,
    )
    return outputs if bias is None else outputs + bias.reshape(-1, *[1] * spatial)


def _padding(
    attributes: Attributes,
    sizes: Sequence[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[Any, Any]]:
    """Before and after each spatial axis."""
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return [
            _same(size, width, stride, dilation, mode == "SAME_UPPER")
            for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
        ]
    pads = [0] * 2 * len(kernel) if mode == "VALID" else list(attributes.get("pads", [0] * 2 * len(kernel)))
    return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))


def _same(size: Any, width: int, stride: int, dilation: int, upper: bool) -> tuple[Any, Any]:
    total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def _matmul(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    operands, settings = _product(attributes, *inputs)
    return jnp.matmul(*operands, **settings)


def _gemm(inputs: Sequence[Any], attributes: Attributes) -> Any:
    left, right, bias = (*inputs, None)[:3]
    left = left.T if attributes.get("transA") else left
    right = right.T if attributes.get("transB") else right
    product = attributes.get("alpha", 1.0) * _matmul((left, right), attributes)
    return product if bias is None else product + attributes.get("beta", 1.0) * bias


# Normalization, reduction, pooling


def _softmax(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.softmax(inputs[0], axis=attributes.get("axis", -1))


def _log_softmax(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return jax.nn.log_softmax(inputs[0], axis=attributes.get("axis", -1))


def _layer_normalization(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax
    import jax.numpy as jnp

    x, scale, bias = (*inputs, None)[:3]
    axes = tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + attributes.get("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


def _batch_normalization(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, scale, bias, mean, variance = inputs
    shape = (1, -1, *[1] * (x.ndim - 2))
    factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _instance_normalization(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    x, scale, bias = inputs
    axes, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdims=True)
    variance = (centred * centred).mean(axes, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + attributes.get("epsilon", 1e-5))
    return normal * scale.reshape(shape) + bias.reshape(shape)


def _reduce(name: str) -> Operator:
    def run(inputs: Sequence[Any], attributes: Attributes) -> Any:
        x, axes = (*inputs, None)[:2]
        places = attributes.get("axes") if axes is None else _ints(axes)
        if not places:
            if attributes.get("noop_with_empty_axes"):
                return x
            places = range(x.ndim)
        return getattr(_library(x), name)(x, axis=tuple(places), keepdims=bool(attributes.get("keepdims", 1)))

    return run


def _arg_max(inputs: Sequence[Any], attributes: Attributes) -> Any:
    keepdims = bool(attributes.get("keepdims", 1))
    return _library(inputs[0]).argmax(inputs[0], axis=attributes.get("axis", 0), keepdims=keepdims)


def _global_average_pool(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    return jnp.mean(inputs[0], tuple(range(2, inputs[0].ndim)), keepdims=True)


def _max_pool(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax

    return _pool(inputs[0], attributes, -np.inf, jax.lax.max)


def _average_pool(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax
    import jax.numpy as jnp

    x = inputs[0]
    total = _pool(x, attributes, 0.0, jax.lax.add)
    if attributes.get("count_include_pad"):
        return total / math.prod(attributes["kernel_shape"])
    return total / _pool(jnp.ones((1, 1, *x.shape[2:]), x.dtype), attributes, 0.0, jax.lax.add)


def _pool(x: Any, attributes: Attributes, start: float, combine: Callable[[Any, Any], Any]) -> Any:
    import jax

    if attributes.get("ceil_mode"):
        raise EngineError("xla pools without ceil_mode")
    kernel = attributes["kernel_shape"]
    strides = attributes.get("strides", [1] * len(kernel))
    dilations = attributes.get("dilations", [1] * len(kernel))
    return jax.lax.reduce_window(
        x,
        np.asarray(start, x.dtype),
        combine,
        (1, 1, *kernel),
        (1, 1, *strides),
        [(0, 0), (0, 0), *_padding(attributes, x.shape[2:], kernel, strides, dilations)],
        window_dilation=(1, 1, *dilations),
    )


# Shapes and places


def _shape(inputs: Sequence[Any], attributes: Attributes) -> Any:
    sizes = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    known = all(isinstance(size, int) for size in sizes)
    return np.array(sizes, dtype=np.int64 if known else object)


def _reshape(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, shape = inputs
    sizes = _ints(shape)
    if not attributes.get("allowzero"):  # a zero keeps the size that was there
        sizes = [x.shape[place] if isinstance(size, int) and size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(inputs: Sequence[Any], attributes: Attributes) -> Any:
    axis = attributes.get("axis", 1)
    return inputs[0].reshape(math.prod(inputs[0].shape[:axis]), -1)


def _transpose(inputs: Sequence[Any], attributes: Attributes) -> Any:
    return inputs[0].transpose(attributes.get("perm"))


def _expand(inputs: Sequence[Any], attributes: Attributes) -> Any:
    """Broadcasts both ways: where the wanted size is 1, that of the array stays."""
    x, wanted = inputs[0], _ints(inputs[1])
    ndim = max(x.ndim, len(wanted))
    have, want = ([1] * (ndim - len(sizes)) + list(sizes) for sizes in (x.shape, wanted))
    sizes = [old if isinstance(new, int) and new == 1 else new for old, new in zip(have, want, strict=True)]
    known = all(isinstance(size, int) for size in sizes)
    return _library(x, *([] if known else [None])).broadcast_to(x, sizes)


def _tile(inputs: Sequence[Any], attributes: Attributes) -> Any:
    return _library(inputs[0]).tile(inputs[0], _ints(inputs[1]))


def _squeeze(inputs: Sequence[Any], attributes: Attributes) -> Any:
    axes = tuple(_ints(inputs[1])) if len(inputs) > 1 and inputs[1] is not None else None
    return _library(inputs[0]).squeeze(inputs[0], axes)


def _unsqueeze(inputs: Sequence[Any], attributes: Attributes) -> Any:
    return _library(inputs[0]).expand_dims(inputs[0], tuple(_ints(inputs[1])))


def _concat(inputs: Sequence[Any], attributes: Attributes) -> Any:
    return _library(*inputs).concatenate(inputs, axis=attributes["axis"])


def _gather(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, places = inputs
    axis = attributes.get("axis", 0)
    if isinstance(x, np.ndarray) and isinstance(places, np.ndarray):
        return np.asarray(x.take(places.astype(np.int64), axis))
    import jax.numpy as jnp

    # Places before the start count from the end, as in NumPy; beyond it, ONNX promises nothing.
    return jnp.take(jnp.asarray(x), places, axis=axis, mode="wrap")


def _slice(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, starts, ends, axes, steps = (*inputs, None, None)[:5]
    firsts, lasts = _ints(starts), _ints(ends)
    places = range(len(firsts)) if axes is None else _ints(axes)
    strides = [1] * len(firsts) if steps is None else _ints(steps)
    window = [slice(None)] * x.ndim
    for first, last, place, stride in zip(firsts, lasts, places, strides, strict=True):
        window[place] = slice(first, _end(last, stride), stride)
    return x[tuple(window)]


def _end(last: Any, stride: int) -> Any:
    """Nothing for ONNX' numbers that mean all the way."""
    return None if isinstance(last, int) and (last >= 2**31 - 1 or (stride < 0 and last <= 1 - 2**31)) else last


def _split(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, sizes = (*inputs, None)[:2]
    axis = attributes.get("axis", 0)
    if sizes is None:
        size = -(-x.shape[axis] // attributes["num_outputs"])
        bounds = list(range(size, x.shape[axis], size))
    else:
        bounds = np.cumsum(_ints(sizes))[:-1].tolist()
    return tuple(_library(x).split(x, bounds, axis=axis))


def _pad(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    x, pads, value, axes = (*inputs, None, None)[:4]
    places = range(x.ndim) if axes is None else _ints(axes)
    amounts = _ints(pads)
    widths = [(0, 0)] * x.ndim
    for number, place in enumerate(places):
        widths[place] = (amounts[number], amounts[number + len(amounts) // 2])
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        return jnp.pad(x, widths, constant_values=0 if value is None else value.item())
    return jnp.pad(x, widths, mode={"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode])


def _range(inputs: Sequence[Any], attributes: Attributes) -> Any:
    import jax.numpy as jnp

    start, limit, step = (_ints(each)[0] for each in inputs)
    if all(isinstance(each, int | float) for each in (start, limit, step)):
        return np.arange(start, limit, step, dtype=inputs[0].dtype)
    return jnp.arange(start, limit, step)


def _constant(inputs: Sequence[Any], attributes: Attributes) -> Any:
    from onnx.numpy_helper import to_array

    if "value" in attributes:
        return to_array(attributes["value"])
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    name = next(name for name in kinds if name in attributes)
    return np.array(attributes[name], dtype=kinds[name])


def _constant_of_shape(inputs: Sequence[Any], attributes: Attributes) -> Any:
    from onnx.numpy_helper import to_array

    value = to_array(attributes["value"])[0] if "value" in attributes else np.float32(0)
    sizes = _ints(inputs[0])
    if all(isinstance(size, int) for size in sizes):
        return np.full(sizes, value)
    import jax.numpy as jnp

    return jnp.full(sizes, value)


# Recurrent layers (ONNX: LSTM, GRU, RNN; X is (steps, batch, features))


def _recurrent(gates: int, cell: Callable[..., tuple[Any, ...]]) -> Operator:
    """All directions of a recurrent layer.

    Args:
        gates: rows of the weights, in sizes of the hidden state.
        cell: (input times its weights with its bias, hidden weights, hidden bias, state, attributes) -> next state,
            whose first part is what the layer gives.
    """

    def run(inputs: Sequence[Any], attributes: Attributes) -> Any:
        import jax.numpy as jnp

        x, weights, recurrent, bias, lengths, *states = (*inputs, *[None] * 6)[:7]
        if lengths is not None or attributes.get("layout"):
            raise EngineError("xla takes recurrent layers over whole sequences, steps first")
        hidden = attributes["hidden_size"]
        directions = len(weights)
        bias = np.zeros((directions, 2 * gates * hidden), np.float32) if bias is None else bias
        number = 2 if gates == 4 else 1
        zeros = jnp.zeros((directions, x.shape[1], hidden), x.dtype)
        starts = [zeros if state is None else jnp.asarray(state) for state in states[:number]]
        backward = [False, True] if directions == 2 else [attributes.get("direction") == "reverse"]
        ran = [
            _direction(
                functools.partial(cell, attributes=attributes),
                x,
                weights[each],
                recurrent[each],
                np.split(bias[each], 2),
                tuple(start[each] for start in starts),
                backward[each],
                attributes,
            )
            for each in range(directions)
        ]
        outputs = jnp.stack([outputs for outputs, _ in ran], axis=1)
        last = (jnp.stack([state[part] for _, state in ran]) for part in range(number))
        return (outputs, *last)

    return run


def _direction(
    cell: Any,
    x: Any,
    weights: Any,
    recurrent: Any,
    bias: Sequence[Any],
    start: tuple[Any, ...],
    backward: bool,
    attributes: Attributes,
) -> tuple[Any, tuple[Any, ...]]:
    import jax

    projected = _matmul((x, weights.T), attributes) + bias[0]

    def step(state: tuple[Any, ...], given: Any) -> tuple[tuple[Any, ...], Any]:
        following = cell(given, recurrent, bias[1], state)
        return following, following[0]

    state, outputs = jax.lax.scan(step, start, projected, reverse=backward)
    return outputs, state


def _lstm(given: Any, recurrent: Any, bias: Any, state: Any, attributes: Attributes) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    hidden, cell = state
    gates = given + _matmul((hidden, recurrent.T), attributes) + bias
    enter, leave, forget, candidate = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
    return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


def _gru(given: Any, recurrent: Any, bias: Any, state: Any, attributes: Attributes) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    if not attributes.get("linear_before_reset"):
        raise EngineError("xla takes GRUs that reset after the product, as PyTorch's do")
    (hidden,) = state
    update, reset, candidate = jnp.split(given, 3, axis=-1)
    update_h, reset_h, candidate_h = jnp.split(_matmul((hidden, recurrent.T), attributes) + bias, 3, axis=-1)
    update = jax.nn.sigmoid(update + update_h)
    candidate = jnp.tanh(candidate + jax.nn.sigmoid(reset + reset_h) * candidate_h)
    return ((1 - update) * candidate + update * hidden,)


def _rnn(given: Any, recurrent: Any, bias: Any, state: Any, attributes: Attributes) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    names = {name.decode() if isinstance(name, bytes) else name for name in attributes.get("activations", ["Tanh"])}
    total = given + _matmul((state[0], recurrent.T), attributes) + bias
    return (jax.nn.relu(total) if names == {"Relu"} else jnp.tanh(total),)


_OPERATORS: Mapping[str, Operator] = {
    "Abs": _elementwise("abs"),
    "Add": _elementwise("add"),
    "And": _elementwise("logical_and"),
    "ArgMax": _arg_max,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Ceil": _elementwise("ceil"),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Cos": _elementwise("cos"),
    "Div": _divide,
    "Dropout": _activation(lambda x: x),
    "Elu": _elu,
    "Equal": _elementwise("equal"),
    "Erf": _activation(_erf),
    "Exp": _elementwise("exp"),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _elementwise("floor"),
    "GRU": _recurrent(3, _gru),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Greater": _elementwise("greater"),
    "GreaterOrEqual": _elementwise("greater_equal"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _activation(lambda x: x),
    "InstanceNormalization": _instance_normalization,
    "IsNaN": _elementwise("isnan"),
    "LSTM": _recurrent(4, _lstm),
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky_relu,
    "Less": _elementwise("less"),
    "LessOrEqual": _elementwise("less_equal"),
    "Log": _elementwise("log"),
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _fold("maximum"),
    "MaxPool": _max_pool,
    "Min": _fold("minimum"),
    "Mul": _elementwise("multiply"),
    "Neg": _elementwise("negative"),
    "Not": _elementwise("logical_not"),
    "Or": _elementwise("logical_or"),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _elementwise("power"),
    "RNN": _recurrent(1, _rnn),
    "Range": _range,
    "Reciprocal": _activation(lambda x: 1 / x),
    "ReduceMax": _reduce("max"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("min"),
    "ReduceProd": _reduce("prod"),
    "ReduceSum": _reduce("sum"),
    "Relu": _activation(_relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _activation(_sigmoid),
    "Sign": _elementwise("sign"),
    "Sin": _elementwise("sin"),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _activation(_softplus),
    "Split": _split,
    "Sqrt": _elementwise("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _elementwise("subtract"),
    "Tanh": _elementwise("tanh"),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
