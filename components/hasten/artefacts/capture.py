"""From a module to a graph: one capture that all engines and graph passes start from, and what it costs per row."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from torch.export import ExportedProgram

from hasten.artefacts.module import example, forward
from hasten.artefacts.operators import kind
from hasten.core.errors import PassError
from hasten.core.interfaces import Columns, Graph, Input, Signature

OPSET = 18
"""The opset that PyTorch's exporter writes natively, without a conversion."""
OUTPUT = "output"

_ONNX, _REFERENCE, _SIGNATURE, _COST = "model.onnx", "reference.safetensors", "signature.json", "cost.json"
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_DROPOUTS = frozenset({"dropout", "alpha_dropout", "feature_dropout"})


@dataclass(frozen=True, kw_only=True)
class GraphCost:
    """What one request of one row asks of the hardware, before any engine fuses or rewrites anything.

    Attributes:
        flops: by operator kind. 2 per multiply-add of a convolution or linear layer, biases not counted; 2 per element
            that a normalization writes; 1 per element that a pooling reads or any other operator writes; 0 for copies.
        num_bytes: by operator kind: inputs, weights and outputs, each once per operator.
        calls: by operator kind. Views move nothing and are left out.
        num_parameters: trainable or not; tied ones once.
        weight_bytes: parameters, and the buffers that the graph reads.
    """

    flops: Mapping[str, int]
    num_bytes: Mapping[str, int]
    calls: Mapping[str, int]
    num_parameters: int
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphCost:
        return cls(**values)


def write_graph(
    module: torch.nn.Module, module_folder: Path, signature: Signature, rows: Columns, folder: Path
) -> Graph:
    """Captures a module and writes the graph, its cost, its signature and reference outputs into the folder.

    Args:
        module_folder: where the module artefact of `module` lies.
        rows: inputs (B, *shape) whose eager outputs engines are compared with.

    Raises:
        PassError: the module can't be captured.
    """
    program = capture(module, signature)
    to_onnx(program, signature, folder / _ONNX)
    fixed = any(each.dynamic for each in signature.inputs)
    cost = cost_of(module, signature) if fixed else count(program)
    eager = copy.deepcopy(module).eval()
    with torch.inference_mode():
        outputs = forward(eager, {name: torch.tensor(values) for name, values in rows.items()}).numpy()
    reference = {f"inputs.{name}": np.ascontiguousarray(values) for name, values in rows.items()}
    save_file({**reference, "outputs": np.ascontiguousarray(outputs)}, folder / _REFERENCE)
    _write_json(folder / _COST, cost.to_dict())
    _write_json(folder / _SIGNATURE, signature.to_dict())
    return read_graph(folder, module_folder)


def read_graph(folder: Path, module_folder: Path) -> Graph:
    """The float graph that `write_graph` wrote."""
    signature = Signature.from_dict(json.loads((folder / _SIGNATURE).read_text(encoding="utf-8")))
    return Graph(
        module=module_folder,
        onnx=folder / _ONNX,
        signature=signature,
        quantized=False,
        reference=folder / _REFERENCE,
    )


def cost_of(module: torch.nn.Module, signature: Signature) -> GraphCost:
    """What one row costs whose dynamic axes have the sizes of the signature.

    Raises:
        PassError: the module can't be captured.
    """
    lengths_fixed = tuple(replace(each, dynamic=()) for each in signature.inputs)
    return count(capture(module, replace(signature, inputs=lengths_fixed)))


def read_cost(folder: Path) -> GraphCost:
    """The cost that `write_graph` wrote."""
    return GraphCost.from_dict(json.loads((folder / _COST).read_text(encoding="utf-8")))


def capture(module: torch.nn.Module, signature: Signature) -> ExportedProgram:
    """The module in eval mode as a graph with a dynamic batch, and dynamic lengths where the signature declares them.

    The module itself stays as it is. Axes that are dynamic in several inputs at the same place are one length.

    Raises:
        PassError: torch.export refused it, with the first line of its reason.
    """
    # A captured GraphModule (PT2E) refuses eval(); it was captured in eval mode.
    frozen = module if isinstance(module, torch.fx.GraphModule) else copy.deepcopy(module).eval()
    inputs = example(signature.inputs)
    named = len(inputs) > 1
    axes = {each.name: _dynamic_axes(each) for each in signature.inputs}
    try:
        with quiet():
            return torch.export.export(
                frozen,
                () if named else tuple(inputs.values()),
                inputs if named else None,
                dynamic_shapes=axes if named else tuple(axes.values()),
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        shapes = ", ".join(f"{each.name} {('batch', *each.shape)}" for each in signature.inputs)
        raise PassError(f"the model can't be captured by torch.export with {shapes}: {reason}") from error


def _dynamic_axes(source: Input) -> dict[int, Any]:
    lengths = {axis + 1: torch.export.Dim(f"length{axis}", max=source.shape[axis]) for axis in source.dynamic}
    return {0: torch.export.Dim("batch"), **lengths}


def to_onnx(program: ExportedProgram, signature: Signature, file: Path) -> None:
    """Writes the graph as one ONNX file with a dynamic batch; the same weights and code give the same bytes."""
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(signature.names),
            output_names=[OUTPUT],
            verbose=False,
        )
    assert exported is not None
    write_onnx(exported.model_proto, file)


def write_onnx(model: onnx.ModelProto, file: Path) -> None:
    """Writes a model without what differs from run to run or names this machine: stack traces, symbols, doc strings."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.ClearField("metadata_props")
    bare.ClearField("doc_string")
    _clean(bare.graph)
    for weight in bare.graph.initializer:
        _unify_zeros(weight)
    lengths: dict[str, str] = {}
    for value in (*bare.graph.input, *bare.graph.output):
        batch, *others = value.type.tensor_type.shape.dim
        batch.dim_param = "batch"
        for size in others:
            if size.dim_param:
                size.dim_param = lengths.setdefault(size.dim_param, f"length{len(lengths)}")
    file.write_bytes(bare.SerializeToString(deterministic=True))


def _unify_zeros(weight: onnx.TensorProto) -> None:
    """Makes negative zeros positive, in place: where the exporter folds a normalization of negative scale into pruned
    weights it leaves zeros of both signs, and a compressor finds one pattern less often than the other."""
    if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1 and weight.raw_data:
        weight.raw_data = (np.frombuffer(weight.raw_data, "<f4") + np.float32(0)).tobytes()


def _clean(graph: onnx.GraphProto) -> None:
    """Drops metadata in place, and the inferred shapes, which every reader infers again; numbers the nodes by type."""
    for field in ("metadata_props", "doc_string", "value_info"):
        graph.ClearField(field)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    seen: Counter[str] = Counter()
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        node.name = f"{node.op_type}_{seen[node.op_type]}"
        seen[node.op_type] += 1
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _clean(subgraph)


def count(program: ExportedProgram) -> GraphCost:
    """Arithmetic and traffic of one row, from the shapes in the graph; lengths have to be captured as fixed."""
    flops: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for node in program.graph.nodes:
        if not _works(node):
            continue
        operator = kind(_name(node))
        calls[operator] += 1
        flops[operator] += _flops(node, operator)
        num_bytes[operator] += sum(_bytes(tensor) for tensor in (*_inputs(node), *_outputs(node)))
    parameters = {tensor.data_ptr(): tensor for _, tensor in program.named_parameters()}
    return GraphCost(
        flops=dict(flops),
        num_bytes=dict(num_bytes),
        calls=dict(calls),
        num_parameters=sum(tensor.numel() for tensor in parameters.values()),
        weight_bytes=sum(tensor.nbytes for tensor in _weights(program).values()),
    )


def _weights(program: ExportedProgram) -> dict[int, torch.Tensor]:
    """Parameters and buffers that some operator reads, by their address, so that tied ones appear once."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    read = [names[node.name] for node in program.graph.nodes if node.name in names and node.users]
    tensors = {**program.state_dict, **program.constants}
    return {tensors[name].data_ptr(): tensors[name] for name in read}


def _works(node: torch.fx.Node) -> bool:
    """Whether the node computes or moves tensors: no view, no shape arithmetic, no dropout (which is off)."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _outputs(node):
        return False
    aliases = [value.alias_info for value in node.target._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and _name(node) not in _DROPOUTS


def _flops(node: torch.fx.Node, operator: str) -> int:
    if operator in ("convolution", "linear"):
        return 2 * _multiply_adds(node)
    written = sum(_numel(tensor) for tensor in _outputs(node))
    if operator == "pooling":
        return sum(_numel(tensor) for tensor in _inputs(node))
    return {"normalization": 2, "elementwise": 1, "quantize": 2, "copy": 0}.get(operator, 1) * written


def _multiply_adds(node: torch.fx.Node) -> int:
    name = _name(node)
    inputs = [argument.meta["val"] for argument in node.args if isinstance(argument, torch.fx.Node)]
    (output, *_) = _outputs(node)
    if name in _RECURRENT:
        steps = _numel(inputs[0]) // _shape(inputs[0])[-1]
        return steps * sum(_numel(tensor) for tensor in _inputs(node)[1:] if tensor.ndim == 2)
    if name.startswith("conv_transpose"):
        return _numel(inputs[0]) * math.prod(_shape(inputs[1])[1:])
    if name.startswith("conv"):
        return _numel(output) * math.prod(_shape(inputs[1])[1:])
    if name == "scaled_dot_product_attention":
        query, key, value = (_shape(tensor) for tensor in inputs[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    left = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
    return _numel(output) * _shape(left)[-1]


def _name(node: torch.fx.Node) -> str:
    """`conv2d` of `aten.conv2d.default`."""
    return str(node.target).split(".")[1]


def _inputs(node: torch.fx.Node) -> list[torch.Tensor]:
    values = (argument.meta.get("val") for argument in node.all_input_nodes)
    return [value for value in values if isinstance(value, torch.Tensor)]


def _outputs(node: torch.fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return [value for value in values if isinstance(value, torch.Tensor)]


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape with a batch of one row."""
    return tuple(_one_row(size) for size in tensor.shape)


def _one_row(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(_shape(tensor))


def _bytes(tensor: torch.Tensor) -> int:
    return _numel(tensor) * tensor.element_size()


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch.export, its ONNX exporter and torchao say about themselves and nobody can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.utils._pytree", "torchao")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=DeprecationWarning)
        # Every LSTM and GRU assigns them; they are the parameters themselves.
        warnings.filterwarnings(
            "ignore", message=r".*_flat_weights.* were assigned during export", category=UserWarning
        )
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
