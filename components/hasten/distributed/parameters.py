"""Parameters that are whole, and those of which each process has a part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from hasten.distributed.group import Group


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one kernel of an optimizer can take together: whole ones, and those divided on each mesh."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


def own_part(values: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What this process has of a tensor that may be divided, and the same part of another that is whole."""
    if not isinstance(values, DTensor):
        return values, whole
    divided = distribute_tensor(whole, values.device_mesh, values.placements, src_data_rank=None)
    return values.to_local(), divided.to_local()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model as plain tensors on the CPU, in the first process; elsewhere it is empty.

    All processes have to call it at the same time.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def complete_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums gradients of whole parameters to which each process has added only what its part of a sequence gives."""
    summands = [(each, grad) for each in parameters if isinstance(grad := each.grad, DTensor) and _is_summand(grad)]
    if not summands:
        return
    mesh = summands[0][1].device_mesh
    total = torch.cat([grad.to_local().flatten() for _, grad in summands])
    dist.all_reduce(total, group=mesh.get_group())
    sums = torch.split(total, [grad.numel() for _, grad in summands])
    for (parameter, grad), its in zip(summands, sums, strict=True):
        parameter.grad = DTensor.from_local(its.view(grad.shape), mesh, [Replicate()], run_check=False)


def _is_summand(gradient: DTensor) -> bool:
    return any(placed.is_partial() for placed in gradient.placements)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float, group: Group) -> Tensor:
    """Scales all gradients down so that their norm together is at most so much, as `clip_grad_norm_` of PyTorch does.

    A whole parameter counts once, whoever else has it, and one that is divided with all of its parts.

    Returns:
        The norm that they had, a scalar.
    """
    squares = torch.zeros(2 ** len(_DIVIDING), dtype=torch.float64)
    local = []
    for parameter in parameters:
        if parameter.grad is not None:
            local.append(_part(parameter.grad))
            squares[_divided_over(parameter.grad)] += torch.linalg.vector_norm(local[-1]).double().square()
    norm = _total(squares, group).sqrt()
    torch._foreach_mul_(local, torch.clamp(most / (norm + 1e-6), max=1.0).float())
    return norm


_DIVIDING = ("shards", "tensor")
"""Dimensions of the mesh over which parameters are divided; a set of them is a number with a bit for each."""


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _divided_over(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 0
    placed = dict(zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True))
    return sum(2**bit for bit, name in enumerate(_DIVIDING) if name in placed and not placed[name].is_replicate())


def _total(squares: Tensor, group: Group) -> Tensor:
    """Of all parameters, from the squares of this process' parts, summed by what they are divided over."""
    for bit, name in enumerate(_DIVIDING):
        if getattr(group.shape, name) > 1:
            numbers = [number for number in range(len(squares)) if number >> bit & 1]
            divided = squares[numbers]
            dist.all_reduce(divided, group=group.mesh.get_group(name))
            squares[numbers] = divided
    total = squares.sum()
    if group.shape.pipeline > 1:  # each stage has parameters of its own
        dist.all_reduce(total, group=group.mesh.get_group("pipeline"))
    return total
