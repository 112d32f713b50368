"""Parameters, gradients and optimizer states divided among processes, by PyTorch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hasten.artefacts.blocks import Block, blocks
from hasten.artefacts.wrapper import inner
from hasten.core.errors import PassError
from hasten.distributed.group import Group


def sharded(model: nn.Module, group: Group, separate: Iterable[Sequence[nn.Module]] | None = None) -> FSDPModule:
    """Divides a model in place among the shards of a group, each block by itself and what is left as one.

    Gradients are the mean over all that have other rows: summed over the shards, each of which keeps its part, and over
    the replicas (hybrid shard, Zhao et al. 2023), where there are any.

    Args:
        separate: modules of each block; None for what a model shows by its sequences of modules.

    Raises:
        PassError: the model has a parameter that can't be divided.
    """
    spread = group.spread
    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise PassError(
            f"distributed={spread.kind} can't divide {', '.join(scalars[:3])}{' ...' if scalars[3:] else ''}, which "
            "PyTorch wants to have at least one axis: distributed=ddp keeps all whole"
        )
    mesh = group.mesh["replicas", "shards"] if group.shape.replicas > 1 else group.mesh["shards"]
    reduced = None if spread.reduce_precision == "float32" else getattr(torch, spread.reduce_precision)
    policy = MixedPrecisionPolicy(reduce_dtype=reduced)
    model.register_forward_hook(unviewed)
    for block in apart(model) if separate is None else separate:
        block[-1].register_forward_hook(unviewed)
        fully_shard(list(block), mesh=mesh, mp_policy=policy, reshard_after_forward=spread.reshard)
    whole: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=policy)
    return whole


@contextmanager
def adding_up(model: FSDPModule, group: Group) -> Iterator[None]:
    """Where gradients only add up in this process; without `reshard` its parameters stay collected, too."""
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(group.spread.reshard)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)


def unviewed(module: nn.Module, arguments: Any, output: Any) -> Any:
    """Outputs that are no views: what changes a view where it lies would lose the hook of its backward pass."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def apart(model: nn.Module) -> list[Sequence[nn.Module]]:
    """Blocks that have matrices, of which none is shared with other parts of the model."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def own(block: Block) -> bool:
        here = Counter(
            id(parameter)
            for module in block.modules
            for _, parameter in module.named_parameters(remove_duplicate=False)
        )
        return here == {name: uses[name] for name in here}

    return [
        block.modules
        for block in blocks(inner(model))
        if own(block) and any(parameter.ndim > 1 for module in block.modules for parameter in module.parameters())
    ]
