"""Gradients averaged over processes, by PyTorch's `DistributedDataParallel`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from hasten.distributed.group import Group

_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")
"""What PowerSGD remembers of each bucket of gradients."""


class Wrapped(nn.Module):
    """A model whose forward pass is calculated by a function of it and its named inputs, such as a compiled one."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.model, self._run = model, run

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._run(self.model, inputs)


def averaged(module: nn.Module, group: Group) -> DistributedDataParallel:
    """The module, whose gradients are the mean over those with other rows after each backward pass not in `no_sync`."""
    spread = group.spread
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for `broadcast_buffers`, which earlier versions do not know.
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*", category=FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=group.rows_group,
            bucket_cap_mb=spread.bucket_mb,
            static_graph=spread.static_graph,
            find_unused_parameters=spread.unused_parameters,
            gradient_as_bucket_view=spread.bucket_views,
            broadcast_buffers=False,  # statistics of batches are of all processes, and equal
        )
    if spread.compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=group.rows_group,
            matrix_approximation_rank=spread.powersgd_rank,
            start_powerSGD_iter=spread.powersgd_start,
            min_compression_rate=1,
        )
        wrapped.register_comm_hook(state, _powersgd)
        wrapped.error_feedback = state  # type: ignore[assignment]  # no module
    elif spread.compression != "none":
        hook = {"float16": default_hooks.fp16_compress_hook, "bfloat16": _bfloat16}[spread.compression]
        wrapped.register_comm_hook(group.rows_group, hook)
    return wrapped


def _powersgd(state, bucket):  # type: ignore[no-untyped-def]  # as below
    """PyTorch's hook, waited for: one bucket at a time.

    It sums one factor after the other, the second where gloo's thread is told that the first has arrived, and waits
    there for it. Buckets on their way at the same time would ask for sums in another order in every process, and leave
    no thread of gloo's two to answer.
    """
    future = powerSGD_hook.powerSGD_hook(state, bucket)
    future.wait()
    return future


def error_feedback(wrapped: DistributedDataParallel) -> dict[str, Any]:
    """What PowerSGD remembers of earlier steps in this process, as tensors and plain data; empty where nothing does."""
    state = getattr(wrapped, "error_feedback", None)
    if state is None:
        return {}
    name, keys, position, has_gauss, cached = state.rng.get_state(legacy=True)
    return {
        "iteration": state.iter,
        "generator": (str(name), keys.tolist(), int(position), int(has_gauss), float(cached)),
        **{field: dict(getattr(state, field)) for field in _MEMORIES},
    }


def restore_error_feedback(wrapped: DistributedDataParallel, kept: Mapping[str, Any]) -> None:
    """Gives PowerSGD what it remembered, after a backward pass that showed in which order gradients are averaged."""
    state: Any = wrapped.error_feedback
    state.iter = kept["iteration"]
    name, keys, *others = kept["generator"]
    state.rng.set_state((name, np.array(keys, dtype=np.uint32), *others))
    for field in _MEMORIES:
        setattr(state, field, dict(kept[field]))


def _bfloat16(state, bucket):  # type: ignore[no-untyped-def]  # PyTorch compares the annotation, which here is a string
    """PyTorch's hook, which looks at the function that is registered and takes itself only with CUDA."""
    return default_hooks.bf16_compress_hook(state, bucket)
