"""Parameters averaged over processes now and then, in place of the gradients of each step (local SGD, Stich 2019)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.distributed.group import Group


@torch.no_grad()
def average(tensors: Iterable[Tensor], group: Group) -> None:
    """Gives each the mean over those with other rows, of all in one collective; integers are left as they are."""
    mine = [tensor for tensor in tensors if tensor.is_floating_point()]
    whole = torch.cat([tensor.reshape(-1) for tensor in mine])
    dist.all_reduce(whole, group=group.rows_group)
    whole /= group.shape.data
    sizes = [tensor.numel() for tensor in mine]
    for tensor, values in zip(mine, torch.split(whole, sizes), strict=True):
        tensor.copy_(values.view_as(tensor))
