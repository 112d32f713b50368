"""Layers divided among processes as a plan says, by PyTorch's `parallelize_module` (Shoeybi et al. 2019)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional
from torch.nn.utils import parametrize

from hasten.artefacts.module import forward
from hasten.artefacts.wrapper import inner
from hasten.core.errors import ConfigError, PassError, first_line
from hasten.core.recipe import nearest
from hasten.core.tensor_plan import SEQUENCE, TensorPlan
from hasten.distributed.group import Group
from hasten.distributed.sharded import unviewed

_TOLERANCE = 1e-3
"""Largest difference between outputs of the model whole and divided, as a share of the largest output; of gradients
likewise."""
_HEAD_SIZES = ("head_size", "head_dim", "attention_head_size")
"""Attributes of attention modules: features of a head, which must stay together."""
_PLACES = Shard(1)
"""A sequence (B, L, ...) in parts of equal length."""


def divide(model: nn.Module, plan: TensorPlan, group: Group, rows: Mapping[str, Tensor]) -> None:
    """Divides layers of a model in place among the processes of a group's dimension `tensor`.

    What the plan does not name stays whole, and the same in all processes.

    Args:
        rows: a few, on which it is tried that the divided model gives what the whole one does, and that what stays
            whole has the same gradients.

    Raises:
        ConfigError: the plan does not fit the model, or another plan would be right for it.
    """
    network, size = inner(model), group.shape.tensor
    if problems := [*plan.problems(tensor=size, sequence_parallel=group.spread.sequence_parallel)]:
        raise ConfigError(*problems)
    chosen = _chosen(network, plan, sequence_parallel=group.spread.sequence_parallel)
    _check(network, chosen, plan, size)
    left = _left(model, network, chosen)
    whole = _tried(model, rows, left)
    styles = {name: _style(word, group.spread.sequence_parallel) for name, word in chosen.items()}
    parallelize_module(network, group.mesh["tensor"], styles)
    for name, word in chosen.items():
        if word != "shared":  # after the hooks that make plain tensors of what a divided layer gives
            network.get_submodule(name).register_forward_hook(unviewed)
    _compare(whole, model, rows, left, plan)


def localize(model: nn.Module, plan: TensorPlan, size: int) -> list[nn.Module]:
    """Makes of a model in place what one of so many processes calculates, with nobody to sum with: for its sizes alone.

    Along the sequence nothing is divided.

    Returns:
        Modules whose outputs are summed or put together, and as much of gradients in the backward pass.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    if problems := [*plan.problems(tensor=size, sequence_parallel=False)]:
        raise ConfigError(*problems)
    network = inner(model)
    chosen = _chosen(network, plan, sequence_parallel=False)
    _check(network, chosen, plan, size)
    summed = []
    for name, word in chosen.items():
        module = network.get_submodule(name)
        if word == "shared":
            continue
        if word != "column":
            summed.append(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        along = 1 if word == "row" else 0
        module.weight = nn.Parameter(weight.detach().chunk(size, along)[0].clone(), weight.requires_grad)
        if word.startswith("column") and isinstance(bias := module.bias, Tensor):
            module.bias = nn.Parameter(bias.detach().chunk(size)[0].clone(), bias.requires_grad)
        if word == "column_gathered":
            module.register_forward_hook(lambda _, arguments, output: torch.cat([output] * size, -1))
        elif word in ("row", "embedding"):
            module.register_forward_hook(lambda _, arguments, output: output.clone())
    return summed


def _chosen(network: nn.Module, plan: TensorPlan, *, sequence_parallel: bool) -> dict[str, str]:
    """Name of a module -> word of the plan that stands for it now."""
    names = [name for name, _ in network.named_modules() if name]
    for pattern in plan.layers:
        if not any(fits(name, pattern) for name in names):
            raise ConfigError(f"{plan.key}: the model has no module {pattern!r}{nearest(pattern, names)}")
    found = {name: next((word for pattern, word in plan.layers.items() if fits(name, pattern)), "") for name in names}
    return {name: word for name, word in found.items() if word and (sequence_parallel or word not in SEQUENCE)}


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern of a plan is for the module of that name."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


_KINDS: Mapping[str, tuple[type[nn.Module], str]] = {
    "column": (nn.Linear, "out_features"),
    "column_gathered": (nn.Linear, "out_features"),
    "row": (nn.Linear, "in_features"),
    "embedding": (nn.Embedding, "num_embeddings"),
}
"""Word -> the module that it divides, and which of its sizes."""


def _check(network: nn.Module, chosen: Mapping[str, str], plan: TensorPlan, size: int) -> None:
    uses = Counter(id(each) for _, each in network.named_parameters(remove_duplicate=False))
    among = f"can't be divided among distributed.tensor={size}"
    for name, word in chosen.items():
        module = network.get_submodule(name)
        if word not in _KINDS:
            continue
        kind, attribute = _KINDS[word]
        if not isinstance(module, kind):
            raise ConfigError(f"{plan.key}: {name} is a {type(module).__name__}, and {word} divides a {kind.__name__}")
        features = getattr(module, attribute)
        if features % size:
            raise ConfigError(f"{plan.key}: {name} {among}: its {attribute} are {features}")
        head = _head_size(network.get_submodule(name.rpartition(".")[0])) if word == "column" else None
        if head and features // size % head:
            raise ConfigError(f"{plan.key}: {name} {among}: it has {features // head} heads")
        if parametrize.is_parametrized(module):
            raise PassError(f"{name} {among}, as its weights are made of others while it trains: distributed=fsdp can")
        if any(uses[id(each)] > 1 for each in module.parameters()):
            raise ConfigError(f"{plan.key}: {name} {among}: it shares its weights with another layer")


def _head_size(module: nn.Module) -> int | None:
    """Features of an attention head, where the module has heads."""
    return next((size for size in (getattr(module, name, None) for name in _HEAD_SIZES) if isinstance(size, int)), None)


def _style(word: str, sequence_parallel: bool) -> ParallelStyle:
    stream = _PLACES if sequence_parallel else Replicate()
    if word == "column":
        return ColwiseParallel(input_layouts=stream)
    if word == "column_gathered":
        return ColwiseParallel(output_layouts=Replicate())
    if word == "row":
        return RowwiseParallel(output_layouts=stream)
    if word == "embedding":
        return RowwiseParallel(input_layouts=Replicate())
    return _Shared(stream) if word == "shared" else _InParts(word)


class _Shared(ParallelStyle):
    """Hands the first argument on as a tensor whose gradient is summed over the processes when it is complete.

    Args:
        given: how the argument is laid out among the processes.
    """

    def __init__(self, given: Placement) -> None:
        super().__init__()
        self._given = given

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if arguments:
                return (self._whole(arguments[0], device_mesh), *arguments[1:]), named
            first = next(iter(named))
            return arguments, {**named, first: self._whole(named[first], device_mesh)}

        module.register_forward_pre_hook(hook, with_kwargs=True)
        return module

    def _whole(self, values: Tensor, mesh: DeviceMesh) -> Tensor:
        laid_out = DTensor.from_local(values, mesh, [self._given], run_check=False)
        return laid_out.redistribute(placements=[Replicate()])


class _InParts(ParallelStyle):
    """Lets a layer calculate on a part of the sequence; plain tensors go in and come out.

    Args:
        word: of the plan.
    """

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self._word == "sequence_scattered":
            module.register_forward_pre_hook(lambda _, arguments: (_part(arguments[0], device_mesh), *arguments[1:]))
        if isinstance(module, nn.Dropout):
            module.forward = partial(_dropped, module, device_mesh)  # type: ignore[method-assign]
        else:
            SequenceParallel(use_local_output=True)._apply(module, device_mesh)
        if self._word == "sequence_gathered":
            module.register_forward_hook(lambda _, arguments, output: _moved(output, device_mesh, _PLACES, Replicate()))
        return module


def _part(values: Tensor, mesh: DeviceMesh) -> Tensor:
    if values.shape[1] % mesh.size():
        raise PassError(
            f"distributed.sequence_parallel=true can't divide a sequence of {values.shape[1]} among "
            f"distributed.tensor={mesh.size()}: sequence_parallel=false divides layers alone"
        )
    return _moved(values, mesh, Replicate(), _PLACES)


def _moved(values: Tensor, mesh: DeviceMesh, given: Placement, wanted: Placement) -> Tensor:
    laid_out = DTensor.from_local(values, mesh, [given], run_check=False)
    moved: Tensor = laid_out.redistribute(placements=[wanted]).to_local()
    return moved


def _dropped(module: nn.Dropout, mesh: DeviceMesh, part: Tensor) -> Tensor:
    """What dropout leaves of this process' part, drawn for the whole sequence: as one process would."""
    if not module.training:
        return part
    ones = part.new_ones(part.shape[0], part.shape[1] * mesh.size(), *part.shape[2:])
    kept = functional.dropout(ones, module.p)
    return part * kept.chunk(mesh.size(), 1)[mesh.get_local_rank()]


def _left(model: nn.Module, network: nn.Module, chosen: Mapping[str, str]) -> list[str]:
    """Names of parameters that learn and belong to none of the chosen modules."""
    divided = {network.get_submodule(name) for name, word in chosen.items() if word != "shared"}
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and module not in divided
    ]


class _Tried(NamedTuple):
    """Outputs of a model, and by their names gradients of parameters; None of those that have no part in it."""

    outputs: Tensor
    gradients: Mapping[str, Tensor | None]


def _tried(model: nn.Module, rows: Mapping[str, Tensor], names: Sequence[str]) -> _Tried:
    training = model.training
    with torch.random.fork_rng(devices=[]):
        outputs = forward(model.eval(), rows)
        parameters = [model.get_parameter(name) for name in names]
        gradients = torch.autograd.grad(outputs.square().sum(), parameters, allow_unused=True) if names else ()
    model.train(training)
    return _Tried(outputs.detach(), dict(zip(names, gradients, strict=True)))


def _compare(
    whole: _Tried, model: nn.Module, rows: Mapping[str, Tensor], left: Sequence[str], plan: TensorPlan
) -> None:
    told = f"{plan.key}: divided as it says the model"
    try:
        divided = _tried(model, rows, left)
    except (RuntimeError, IndexError, TypeError) as error:
        raise ConfigError(f"{told} does not run: {first_line(error)}") from error
    if divided.outputs.shape != whole.outputs.shape:
        raise ConfigError(f"{told} gives {tuple(divided.outputs.shape)} for {tuple(whole.outputs.shape)}")
    difference = (divided.outputs - whole.outputs).abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, whole.outputs.abs().max().item()):
        raise ConfigError(f"{told} gives other outputs, by up to {difference:.2g}")
    found = {name: (one, two) for name, one in whole.gradients.items() if (two := divided.gradients[name]) is not None}
    largest = max((one.abs().max().item() for one, _ in found.values() if one is not None), default=0.0)
    for name, (one, two) in found.items():
        if one is not None and not (two - one).abs().max().item() <= _TOLERANCE * largest:
            raise ConfigError(
                f"{told} gives other gradients of {name}, which each process has from its part of the features alone"
            )
