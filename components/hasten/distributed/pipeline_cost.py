"""What the blocks of a model cost, measured one by one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from hasten.distributed.pipeline_trace import Given, Plain, Shaped, Traced

_REPEATS = 3
_FROM_SHAPES = frozenset(
    {"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement", "stride"}
    | {"dtype", "device", "layout", "is_floating_point"}
)
"""Attributes and methods of tensors whose values are the same for all micro-batches."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


class Measured(NamedTuple):
    """What the blocks of a traced model do for a micro-batch.

    Attributes:
        milliseconds: forward and backward pass of each block.
        given: name -> what the block or the input gives.
    """

    milliseconds: list[float]
    given: dict[str, Given]


def measured(
    traced: Traced,
    inputs: Sequence[Tensor],
    *,
    inside: Callable[[], AbstractContextManager[object]] = nullcontext,
    repeats: int = _REPEATS,
    deadline: float = math.inf,
) -> Measured:
    """Runs a copy of the model block by block on the inputs of a micro-batch.

    Args:
        inside: the context of forward passes, such as autocast.
        repeats: of which the median is taken, after a first run.
        deadline: by `time.monotonic`, after which there is no other.
    """
    watch = _Stopwatch(traced.of(copy.deepcopy(traced.model)), inside)
    runs: list[dict[str, float]] = []
    for number in range(repeats + 1):
        if number == 0 or monotonic() < deadline:
            watch.milliseconds = {}
            with torch.random.fork_rng(devices=[]):
                watch.run(*inputs)
            runs.append(watch.milliseconds)
    later = runs[1:] or runs  # the first allocates
    return Measured(
        milliseconds=[median(run[name] for run in later) for name in traced.names()],
        given=watch.given,
    )


class _Stopwatch(fx.Interpreter):
    """Runs a graph and times the forward and the backward pass of each of its blocks by itself."""

    def __init__(self, module: fx.GraphModule, inside: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__(module)
        self._inside = inside
        self.milliseconds: dict[str, float] = {}
        self.given: dict[str, Given] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            value = super().run_node(n)
            if n.op == "placeholder":
                self.given[n.name] = _shaped(value)
            return value
        args, kwargs = tree_map(_writable, self.fetch_args_kwargs_from_env(n))
        started = perf_counter()
        with self._inside():
            result = getattr(self, n.op)(n.target, args, kwargs)
        learning = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.requires_grad]
        if learning:
            torch.autograd.backward(learning, [torch.ones_like(each) for each in learning])
        self.milliseconds[n.name] = 1e3 * (perf_counter() - started)
        self.given[n.name] = self._kind(n, result)
        return tree_map(_apart, result)

    def _kind(self, node: fx.Node, result: Any) -> Given:
        if isinstance(result, Tensor):
            return _shaped(result)
        if not all(isinstance(each, _PLAIN) for each in tree_leaves(result)):
            return None
        accessed = node.args[1] if node.target is getattr else node.target
        derived = all(isinstance(self.given.get(source.name), Plain) for source in node.all_input_nodes)
        return (
            Plain(tuple(result) if isinstance(result, torch.Size) else result)
            if derived or accessed in _FROM_SHAPES
            else None
        )


def _apart(value: Any) -> Any:
    """A tensor with a history of its own."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _writable(value: Any) -> Any:
    return _apart(value).clone() if isinstance(value, Tensor) else value


def _shaped(value: Tensor) -> Shaped:
    return Shaped(shape=tuple(value.shape), dtype=value.dtype, learns=value.requires_grad)
