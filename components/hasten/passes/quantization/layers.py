"""The convolutions and linear layers of a network, in its captured graph and in its ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch.fx import GraphModule, Node

from hasten.artefacts.operators import kind
from hasten.core.errors import PassError
from hasten.core.recipe import nearest

_RECURRENT = frozenset({"lstm", "gru", "rnn", "rnn_tanh", "rnn_relu"})
"""One operator in one graph and several in the other; no engine here runs them in static integers."""

OUTPUTS_FIRST = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""Operators f(x, weight, bias) whose weights have the output channels as their first axis."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        path: of the module that holds the weight, as of `named_modules`; empty for the model itself.
        weight: name of the weight, as of `named_parameters`.
        node: of the captured graph.
    """

    path: str
    weight: str
    node: Node


def layers(captured: GraphModule) -> tuple[Layer, ...]:
    """The layers of a captured module (`ExportedProgram.module()`), in the order in which they run."""
    constants: dict[Node, tuple[str, int]] = {}
    found = []
    for node in captured.graph.nodes:
        read = [constants[each] for each in node.all_input_nodes if each in constants]
        if node.op == "get_attr":
            constants[node] = str(node.target), tensor(captured, str(node.target)).ndim
        elif read and len(read) == len(node.all_input_nodes):  # a weight that is divided, transposed or scaled
            constants[node] = max(read, key=lambda each: each[1])
        elif _is_layer(operator(node)):
            weights = [name for name, axes in read if axes > 1]
            found += [Layer(path=name.rpartition(".")[0], weight=name, node=node) for name in weights[:1]]
    return tuple(found)


def onnx_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The same layers in the ONNX graph of the same module: their nodes, in the same order."""
    constants = {each.name: len(each.dims) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        read = [constants[name] for name in node.input if name in constants]
        if read and len(read) == len([name for name in node.input if name]):
            constants.update(dict.fromkeys(node.output, max(read)))
        elif max(read, default=0) > 1 and _is_layer(node.op_type):
            found.append(node)
    return found


def kept(keep: Sequence[str], paths: Sequence[str]) -> frozenset[str]:
    """The paths of the layers that stay float.

    Args:
        keep: `first`, `last`, the path of a layer, or of a module with layers in it.
        paths: of all layers, in the order in which they run.

    Raises:
        PassError: there is no such layer, with the nearest one that there is.
    """
    found: set[str] = set()
    for name in keep:
        alone = {path: [path] for path in paths} | {"first": paths[:1], "last": paths[-1:]}
        chosen = alone.get(name) or [path for path in paths if path.startswith(f"{name}.")]
        if not chosen:
            meant = nearest(name, ["first", "last", *paths])
            raise PassError(f"keep names no convolution or linear layer, got {name!r}{meant} (quantization.keep)")
        found.update(chosen)
    return frozenset(found)


def kept_nodes(keep: Sequence[str], captured: GraphModule, model: onnx.ModelProto) -> list[str]:
    """Names of the nodes of an ONNX graph that stay float; the exporter leaves their order, and not their names.

    Raises:
        PassError: there is no such layer, or the two graphs don't have the same ones.
    """
    found, nodes = layers(captured), onnx_layers(model)
    sizes = {each.name: math.prod(each.dims) for each in model.graph.initializer}
    read = [max((sizes[name] for name in node.input if name in sizes), default=1) for node in nodes]
    whole = [tensor(captured, layer.weight).numel() for layer in found]
    # A node may read a part of the weight, such as an attention's queries.
    if len(whole) != len(read) or any(size % part for size, part in zip(whole, read, strict=True)):
        raise PassError(
            f"the layers of the ONNX graph ({len(nodes)}) are not those of the module ({len(found)}), so that none can "
            "be told by its path: leave it out (quantization.keep)"
        )
    wanted = kept(keep, [layer.path for layer in found])
    return [node.name for layer, node in zip(found, nodes, strict=True) if layer.path in wanted]


def _is_layer(operator: str) -> bool:
    return kind(operator) in ("convolution", "linear") and operator.lower() not in _RECURRENT


def tensor(captured: GraphModule, name: str) -> torch.Tensor:
    """The parameter or buffer of that name."""
    owner, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(captured.get_submodule(owner), attribute)
    return found


def operator(node: Node) -> str:
    """`conv2d` of `aten.conv2d.default`; empty for what is no operator of PyTorch."""
    return str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""


def name_of(argument: object) -> str | None:
    """Name of the parameter or buffer that an operator reads there; None if it is computed or absent."""
    return str(argument.target) if isinstance(argument, Node) and argument.op == "get_attr" else None


def normalization(node: Node) -> Node | None:
    """The batch normalization, with weight and bias, that alone reads a layer's outputs; engines fold it in."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or operator(reader) != "batch_norm" or reader.args[0] is not node:
        return None
    return reader if name_of(reader.args[1]) and name_of(reader.args[2]) else None


def folding(node: Node, captured: GraphModule) -> torch.Tensor:
    """What each output channel of a layer is multiplied by when its batch normalization is folded in, or ones."""
    weight = tensor(captured, str(name_of(node.args[1])))
    reader = normalization(node)
    if reader is None:
        return weight.new_ones(len(weight))
    scale, _, _, variance = (tensor(captured, str(name_of(argument))) for argument in reader.args[1:5])
    return scale / (variance + float(str(reader.args[7]))).sqrt()


def end(node: Node) -> Node:
    """Where a layer's outputs are complete: behind its batch normalization, if it has one."""
    return normalization(node) or node


def bias(node: Node) -> str | None:
    """Name of what is added to each channel of a layer at its end; None where nothing is."""
    arguments = end(node).args
    return name_of(arguments[2]) if len(arguments) > 2 else None
