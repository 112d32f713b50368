"""Channels and attention heads that can go, found and cut by torch-pruning's dependency graph (Fang et al. 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from hasten.passes.pruning.groups import Group, Removal, Slice

_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
"""Modules whose width can't be changed a channel at a time."""
_PRODUCTS = ("BmmBackward", "ScaledDotProduct")
"""Products of activations: the channels of an attention's queries, keys and values are divided into heads."""
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm)
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads")
"""Attributes in which attention modules keep how many heads they have ..."""
_WIDTHS = ("all_head_size", "inner_dim")
"""... and how many channels these have together."""


def find(model: nn.Module, example: Mapping[str, Tensor], round_to: int, *, heads: bool) -> list[Group]:
    """The groups of channels, and of heads where they are wanted.

    Args:
        round_to: of channels so many stay, or a multiple.
    """
    graph = _traced(model, example)
    rows = len(next(iter(example.values())))
    found = []
    for group in graph.get_all_groups():
        made = _heads(graph, group, rows) if heads and _products(group) else _channels(graph, group, round_to)
        if made is not None:
            found.append(made)
    return found


def cut(model: nn.Module, example: Mapping[str, Tensor], groups: Mapping[str, Group], removed: Removal) -> None:
    """Removes units of such groups from the model itself."""
    graph = _traced(model, example)
    for name, units in removed.items():
        group, module = groups[name], model.get_submodule(name)
        channels = sorted(group.channels[units[0]].flatten().tolist())
        handler = graph.get_pruner_of_module(module).prune_out_channels
        graph.get_pruning_group(module, handler, channels).prune()
        if group.kind == "heads":
            _tell_heads(model, group, len(units[0]))


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Every parameter with a gradient, which torch-pruning follows, and afterwards those that had one."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message=r".*Unwrapped parameters detected.*")
        warnings.filterwarnings("ignore", message=r".*Unknown operation .* encountered.*")
        model.requires_grad_(True)
        yield
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _traced(model: nn.Module, example: Mapping[str, Tensor]) -> Any:
    from torch_pruning import DependencyGraph
    from torch_pruning.pruner.function import LSTMPruner

    # As `artefacts.module.forward` calls it: one input by its place, several by their names.
    inputs = tuple(example.values()) if len(example) == 1 else dict(example)
    # Known to the graph, so that what leads to them is seen to do so, and never cut by it.
    recurrent = {nn.GRU: LSTMPruner(), nn.RNN: LSTMPruner()}
    with _in_one_piece(model):
        return DependencyGraph().build_dependency(model, example_inputs=inputs, customized_pruners=recurrent)


class _Piece(torch.autograd.Function):
    """Outputs that were computed elsewhere, as one step of the trace."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.clone() for output in outputs)


@contextmanager
def _in_one_piece(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as one step: torch-pruning loses its way in what autograd records of their gates and steps."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def stand_in(module: nn.RNNBase) -> Any:
        compute = module.forward

        def run(given: Any, state: Any = None) -> Any:
            with torch.no_grad():
                outputs, final = compute(given, state)
            if not isinstance(given, Tensor):
                return outputs, final
            states = final if isinstance(final, tuple) else (final,)
            pieces = _Piece.apply(given, module.weight_hh_l0, outputs, *states)  # type: ignore[no-untyped-call]
            outputs, *states = pieces
            return outputs, tuple(states) if isinstance(final, tuple) else states[0]

        return run

    for module in layers:
        module.forward = stand_in(module)
    try:
        yield
    finally:
        for module in layers:
            del module.forward


def _channels(graph: Any, group: Any, round_to: int) -> Group | None:
    if not _is_prunable(graph, group):
        return None
    num_blocks = _num_blocks(group)
    return _group(
        graph,
        group,
        kind="channels",
        # The same places go in each of the blocks that a grouped layer divides its channels into.
        channels=torch.arange(len(group[0].idxs)).view(num_blocks, -1).T,
        multiple=round_to // math.gcd(round_to, num_blocks),
    )


def _heads(graph: Any, group: Any, rows: int) -> Group | None:
    """Heads of an attention of separate linear layers, whose channels are those of one head after another."""
    size = len(group[0].idxs)
    for dep, idxs in group:
        node = dep.target
        if isinstance(node.module, _WHOLE) or (_is_layer(node.module) and not isinstance(node.module, nn.Linear)):
            return None
        if idxs != list(range(size)) or (not node.outputs and graph.is_out_channel_pruning_fn(dep.handler)):
            return None
    shapes = [_product_shape(node, rows) for node in _products(group)]
    numbers = {shape[0] for shape in shapes if shape is not None}
    if len(numbers) != 1 or None in shapes or size % (number := numbers.pop()):
        return None
    return _group(
        graph,
        group,
        kind="heads",
        channels=torch.arange(size).view(number, -1),
        multiple=1,
        products_per_unit=sum(shape[1] for shape in shapes if shape is not None),
    )


def _group(graph: Any, group: Any, *, channels: Tensor, **rest: Any) -> Group | None:
    unit_of = torch.empty(channels.numel(), dtype=torch.int64)
    unit_of[channels] = torch.arange(len(channels))[:, None]
    slices: list[Slice] = []
    for item in group.items:
        if any(place is None for place in item.root_idxs):
            return None
        slices += _slices(graph, item.dep, torch.tensor(item.idxs), unit_of[torch.tensor(item.root_idxs)])
    name = graph._module2name[group[0].dep.target.module]
    return Group(name=name, num_units=len(channels), slices=tuple(slices), channels=channels, **rest)


def _slices(graph: Any, dep: Any, places: Tensor, units: Tensor) -> Iterator[Slice]:
    module = dep.target.module
    if isinstance(module, nn.Parameter):
        axis = dep.target.pruning_dim % module.ndim
        yield Slice(parameter=graph._param_to_name[module], axis=axis, places=places, units=units, judged=False)
        return
    if not _is_layer(module):
        return
    layer = graph._module2name[module]
    judged = not isinstance(module, nn.PReLU)
    if isinstance(module, (nn.Linear, _ConvNd)) and not graph.is_out_channel_pruning_fn(dep.handler):
        transposed = isinstance(module, _ConvTransposeNd)
        blocks = 1 if transposed else getattr(module, "groups", 1)
        axis = 0 if transposed else 1
        yield Slice(
            parameter=f"{layer}.weight", axis=axis, places=places, units=units, blocks=blocks, reads=True, judged=judged
        )
        return
    for name, parameter in module.named_parameters(recurse=False):
        axis = _output_axis(module) if name == "weight" else 0
        yield Slice(
            parameter=f"{layer}.{name}",
            axis=axis,
            places=places,
            units=units,
            blocks=module.groups if axis and isinstance(module, _ConvNd) else 1,
            judged=judged and name == "weight" and parameter.ndim > 0,
        )


def _is_layer(module: Any) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd, nn.PReLU, *_NORMS))


def _output_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, _ConvTransposeNd) else 0


def _is_prunable(graph: Any, group: Any) -> bool:
    """Whether the group's channels are no outputs of the model, and run through nothing that has to stay whole."""
    from torch_pruning.ops import _ConcatOp

    if _products(group):
        return False
    for dep, _ in group:
        node = dep.target
        if isinstance(node.module, _WHOLE):
            return False
        if not node.outputs and graph.is_out_channel_pruning_fn(dep.handler):
            return False
        # torch-pruning 1.6 mixes up the parts of a concatenation whose pixels are flattened, or that a bare parameter
        # of three dimensions leads to, which it takes for the position embedding of a transformer.
        if isinstance(node.module, _ConcatOp) and (node.module.offsets is None or not node.enable_index_mapping):
            return False
    return True


def _num_blocks(group: Any) -> int:
    """Into how many blocks of equal size the group's channels are divided by grouped convolutions and norms."""
    blocks = [1]
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.GroupNorm):
            blocks.append(module.num_groups)
        elif isinstance(module, _ConvNd) and module.groups != module.out_channels:
            blocks.append(module.groups)
    return math.lcm(*blocks)


def _products(group: Any) -> list[Any]:
    """The nodes that multiply activations with one another, each once."""
    nodes = {id(dep.target): dep.target for dep, _ in group}
    return [node for node in nodes.values() if any(name in str(node.name) for name in _PRODUCTS)]


def _product_shape(node: Any, rows: int) -> tuple[int, float] | None:
    """Heads of a product, and multiply-adds per row for one of them; None where it is no product of heads."""
    saved = node.grad_fn
    if "ScaledDotProduct" in str(node.name):
        query, key = saved._saved_query, saved._saved_key
        if query.ndim != 4 or query.shape[1] != key.shape[1]:
            return None
        return query.shape[1], 2.0 * query.shape[2] * key.shape[2] * query.shape[3]
    left, right = saved._saved_self, saved._saved_mat2
    if left is None or right is None or left.shape[0] % rows:
        return None
    return left.shape[0] // rows, float(left.shape[1] * left.shape[2] * right.shape[2])


def _tell_heads(model: nn.Module, group: Group, num_removed: int) -> None:
    """Sets how many heads and channels the modules that own the queries, keys and values say they have."""
    heads, (_, size) = group.num_units, group.channels.shape
    owners = {each.parameter.rpartition(".")[0].rpartition(".")[0] for each in group.slices if not each.reads}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        for names, old, new in (
            (_COUNTS, heads, heads - num_removed),
            (_WIDTHS, heads * size, (heads - num_removed) * size),
        ):
            for name in names:
                if getattr(module, name, None) == old:
                    setattr(module, name, new)
