"""Activations that are calculated again in the backward pass, so that those that are kept fit into a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hasten.artefacts.blocks import Block, blocks
from hasten.artefacts.wrapper import inner
from hasten.core.errors import PassError
from hasten.core.sections import Step
from hasten.training.step import ForwardPass

FLOPS_PER_BYTE = 8
"""Floating-point operations that take about as long as moving a byte between memory and processor (Williams et al.
2009). What is elementwise is weighed by its bytes, what multiplies matrices by its operations."""

_MEASURED_ROWS = (2, 4)
_MB = 1e6
_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a forward pass keeps for the backward pass, by the memory it is in.

    Attributes:
        size_bytes: of each piece of memory; parameters, buffers and the batch itself are none of them.
        outside: numbers of the pieces that are kept for what is outside of all blocks.
        saved: of those that are kept for what is inside, for each block.
        given: of those that each block is given, and would be kept if it were calculated again.
        flops: floating-point operations of each block.
    """

    size_bytes: Sequence[float]
    outside: frozenset[int]
    saved: Sequence[frozenset[int]]
    given: Sequence[frozenset[int]]
    flops: Sequence[float]

    def total_bytes(self, again: frozenset[int] = frozenset()) -> float:
        """Bytes that are kept where the blocks of these numbers are calculated again."""
        pieces = set(self.outside)
        for block, (saved, given) in enumerate(zip(self.saved, self.given, strict=True)):
            pieces |= given if block in again else saved
        return sum(self.size_bytes[piece] for piece in pieces)

    def cost(self, block: int) -> float:
        """Of calculating a block again, in floating-point operations."""
        return self.flops[block] + FLOPS_PER_BYTE * sum(self.size_bytes[piece] for piece in self.saved[block])


def choose(kept: Kept, budget_bytes: float) -> frozenset[int]:
    """Blocks to calculate again so that what is kept fits the budget: those first that cost least for each byte.

    The greedy rule of the knapsack problem (Dantzig 1957), with the gain of each block reckoned anew after each choice,
    as neighbours share memory: what one is given the other has kept as its result.

    Returns:
        All that help, where even they don't suffice.
    """
    again: frozenset[int] = frozenset()
    while (now := kept.total_bytes(again)) > budget_bytes:
        gains = {
            block: now - kept.total_bytes(again | {block}) for block in range(len(kept.saved)) if block not in again
        }
        helpful = [block for block, gain in gains.items() if gain > 0]
        if not helpful:
            break
        again |= {min(helpful, key=lambda block: (kept.cost(block) / gains[block], block))}
    return again


@contextmanager
def budgeted(
    model: nn.Module, step: Step, inputs: Mapping[str, Tensor], num_rows: int, what: str
) -> Iterator[tuple[str, ...]]:
    """Where as many blocks of the model are calculated again as `activation_budget_mb` wants.

    The budget is for what is kept from the forward to the backward pass. A block that is calculated again holds its own
    activations besides, while its part of the backward pass runs.

    Args:
        model: in training mode, on the CPU.
        inputs: a few rows, at least 4 where there are so many.
        num_rows: that a forward pass takes.
        what: is trained, for the error.

    Yields:
        A sentence about what was chosen, where there is a budget.

    Raises:
        PassError: the budget can't be met, naming what can.
    """
    if step.activation_budget_mb is None:
        yield ()
        return
    parts, kept = measure(model, step, inputs, num_rows, what)
    again = choose(kept, step.activation_budget_mb * _MB)
    all_mb, left_mb = kept.total_bytes() / _MB, kept.total_bytes(again) / _MB
    setting = f"trainer.activation_budget_mb={step.activation_budget_mb:g}"
    if left_mb > step.activation_budget_mb:
        raise PassError(
            f"{setting} can't be met: {what} keeps {all_mb:.3g} MB, and {left_mb:.3g} MB with all blocks calculated "
            "again that help: raise it, or calculate fewer rows at a time (trainer.micro_batches)"
        )
    with recomputing([parts[block] for block in sorted(again)]):
        yield (f"{setting}: {_told([parts[block].name for block in sorted(again)], all_mb, left_mb)}",)


def _told(names: Sequence[str], all_mb: float, left_mb: float) -> str:
    if not names:
        return f"all activations fit, about {all_mb:.3g} MB."
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    told = f"{', '.join(names[:_NAMED])}{more}"
    return f"about {left_mb:.3g} of {all_mb:.3g} MB are kept, {told} are calculated again in the backward pass."


def measure(
    model: nn.Module, step: Step, inputs: Mapping[str, Tensor], num_rows: int, what: str = "the model"
) -> tuple[list[Block], Kept]:
    """What each block of the model keeps of so many rows, from two forward passes of a copy on few.

    Pieces of memory grow by a line: some go with the rows, others, such as weights in half precision, are always there.

    Raises:
        PassError: the model keeps other things of other rows.
    """
    trial = copy.deepcopy(model)
    sizes = _MEASURED_ROWS if num_rows >= max(_MEASURED_ROWS) else (num_rows,) * 2
    forward = ForwardPass(trial, replace(step, compile="none"), "cpu")
    found = blocks(inner(trial))
    with torch.random.fork_rng(devices=[]):
        few, more = (
            _measured(forward, trial, found, {name: rows[:size] for name, rows in inputs.items()}) for size in sizes
        )
    if (few.outside, few.saved, few.given) != (more.outside, more.saved, more.given):
        raise PassError(
            f"trainer.activation_budget_mb needs a model that keeps the same of all rows, and {what} doesn't"
        )
    growth = (num_rows - sizes[1]) / max(sizes[1] - sizes[0], 1)
    scaled = [size + growth * (size - less) for less, size in zip(few.size_bytes, more.size_bytes, strict=True)]
    flops = [each * num_rows / sizes[1] for each in more.flops]
    return blocks(inner(model)), replace(more, size_bytes=scaled, flops=flops)


def _measured(forward: ForwardPass, model: nn.Module, found: Sequence[Block], inputs: Mapping[str, Tensor]) -> Kept:
    never = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers(), *inputs.values())}
    pieces: dict[int, int] = {}
    alive: list[Tensor] = []  # what is freed could give its address to the next
    outside: set[int] = set()
    saved: list[set[int]] = [set() for _ in found]
    given: list[set[int]] = [set() for _ in found]
    flops = [0.0] * len(found)
    running: list[int] = []
    called: set[nn.Module] = set()
    size_bytes: list[float] = []

    def note(tensor: Tensor, kept_for: set[int]) -> Tensor:
        memory = _memory(tensor)
        if memory not in never and tensor.numel():
            if memory not in pieces:
                pieces[memory] = len(pieces)
                size_bytes.append(tensor.untyped_storage().nbytes())
                alive.append(tensor.detach())
            kept_for.add(pieces[memory])
        return tensor.detach()

    def enter(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, named: Any) -> None:
            for tensor in tree_leaves((arguments, named)):
                if isinstance(tensor, Tensor):
                    note(tensor, given[block])
            running.append(block)
            flops[block] -= counter.get_total_flops()

        return hook

    def leave(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            running.pop()
            flops[block] += counter.get_total_flops()

        return hook

    with ExitStack() as hooks, FlopCounterMode(display=False) as counter:
        for number, block in enumerate(found):
            for handle in (
                block.modules[0].register_forward_pre_hook(enter(number), with_kwargs=True),
                block.modules[-1].register_forward_hook(leave(number)),
            ):
                hooks.callback(handle.remove)
        for owner in {block.owner for block in found if block.owner is not None}:
            hooks.callback(owner.register_forward_pre_hook(lambda module, arguments: called.add(module)).remove)
        hooks.enter_context(
            saved_tensors_hooks(
                lambda tensor: note(tensor, saved[running[-1]] if running else outside), lambda tensor: tensor
            )
        )
        forward(inputs)
    for number, block in enumerate(found):
        if block.owner is not None and block.owner not in called:
            # Whoever takes the elements of a sequence one by one can't be made to take several at once.
            outside |= saved[number]
            saved[number], given[number] = set(), set()
    return Kept(
        size_bytes=size_bytes,
        outside=frozenset(outside),
        saved=[frozenset(each) for each in saved],
        given=[frozenset(each) for each in given],
        flops=flops,
    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def recomputing(chosen: Sequence[Block]) -> Iterator[None]:
    """Where the blocks keep nothing but what they are given, and are calculated again in the backward pass (Chen et al.
    2016): with the random numbers and the buffers that they had. Afterwards they are as they were."""
    runs: dict[nn.Sequential, list[Block]] = {}
    changed: list[nn.Module] = []
    for block in chosen:
        if block.owner is not None:
            runs.setdefault(block.owner, []).append(block)
            continue
        (module,) = block.modules
        module.forward = _again(block.modules, module.forward)
        changed.append(module)
    for owner, its in runs.items():
        owner.forward = _sequence(owner, its)  # type: ignore[method-assign]
        changed.append(owner)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _sequence(owner: nn.Sequential, chosen: Sequence[Block]) -> Callable[[Any], Any]:
    """Forward pass of a sequence of which some runs of neighbours are calculated again."""
    ends = {block.modules[0]: block.modules for block in chosen}
    elements = list(owner)
    parts: list[Callable[[Any], Any]] = []
    while elements:
        run = ends.get(elements[0], (elements[0],))
        parts.append(_again(run, partial(_one_by_one, run)) if elements[0] in ends else elements[0])
        elements = elements[len(run) :]
    return partial(_one_by_one, parts)


def _one_by_one(functions: Sequence[Callable[[Any], Any]], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


def _again(modules: Sequence[nn.Module], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments, **named)
        contexts = partial(_contexts, modules)
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return run


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass and of its repetition, which sees the buffers as the former did and leaves no trace in them:
    the running statistics of batch normalization move once a step."""
    before = [
        (owner, {name: None if buffer is None else buffer.clone() for name, buffer in owner._buffers.items()})
        for module in modules
        for owner in module.modules()
        if owner._buffers
    ]
    return nullcontext(), _with_buffers(before)


@contextmanager
def _with_buffers(buffers: Sequence[tuple[nn.Module, dict[str, Tensor | None]]]) -> Iterator[None]:
    now = [(owner, dict(owner._buffers)) for owner, _ in buffers]
    for owner, before in buffers:
        owner._buffers.update(before)
    try:
        yield
    finally:
        for owner, after in now:
            owner._buffers.update(after)
