"""Looks at a training step without calculating it: which bytes live when, and how much arithmetic there is.

The model and its rows are fake tensors, which have shapes and no memory, so that a model is looked at that would not
fit. What kernels take for themselves while they run is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hasten.core.errors import HastenError, first_line
from hasten.core.interfaces import Input, Task
from hasten.core.sections import Step
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.batch_norm import UnaskedBatchNorm
from hasten.distributed.footprint import Footprint, Part, PerRow, Weight
from hasten.distributed.sharded import apart
from hasten.distributed.tensor import localize
from hasten.training.step import ForwardPass

LOOKED_AT = (4, 8)
"""Rows of the two batches through whose figures lines are laid."""
_OUTSIDE = -1


def footprint(
    make: Callable[[], nn.Module],
    inputs: Sequence[Input],
    targets: Tensor,
    task: Task,
    step: Step,
    rows: tuple[int, int] = LOOKED_AT,
    *,
    alone: bool = True,
    plan: TensorPlan = WHOLE,
    tensor: int = 1,
) -> Footprint:
    """What a step of a model asks for.

    Args:
        make: gives the model, in training mode; called where tensors are fake.
        targets: of one row or more; only their shape and type matter.
        rows: of two batches; the figures are right for these, and no less than the truth between them.
        alone: false where other processes have other rows, over which batch normalization goes as well.
        plan, tensor: by which layers are divided, and among how many processes; the figures are one process' own.

    Raises:
        HastenError: the model can't be looked at without calculating.
    """
    try:
        few, many = (_looked_at(make, inputs, targets, task, step, number, alone, plan, tensor) for number in rows)
    except HastenError:
        raise
    except Exception as error:  # whatever a user's model does with tensors that hold nothing
        raise HastenError(f"the model can't be looked at without calculating: {first_line(error)}") from error
    if len(few.windows) != len(many.windows):
        raise HastenError("the model calculates otherwise for another number of rows")

    def line(one: float, other: float) -> PerRow:
        return PerRow.through((rows[0], one), (rows[1], other))

    parts = [
        Part(
            inside=one.inside,
            begins=one.begins,
            weights=tuple(one.weights),
            saved=line(one.saved, other.saved),
            forward=line(one.forward, other.forward),
            backward=line(one.backward, other.backward),
            output=line(one.output, other.output),
            flops=line(one.flops, other.flops),
            summed=line(one.summed, other.summed),
            num_summed=one.num_summed,
        )
        for one, other in zip(few.windows, many.windows, strict=True)
    ]
    return Footprint(
        parts=tuple(parts),
        given_bytes=few.given_bytes,
        buffer_bytes=few.buffer_bytes,
        input_bytes=line(few.input_bytes, many.input_bytes),
        update_share=few.update_bytes / max(1, few.trained_bytes),
        state_share=few.state_bytes / max(1, few.trained_bytes),
    )


@dataclass(kw_only=True)
class _Window:
    """A stretch of the forward pass, from one change of the innermost module to the next.

    Attributes:
        first_node: number of the first node of the backward pass that was made in it.
    """

    inside: bool
    begins: bool
    first_node: int
    weights: list[Weight] = field(default_factory=list)
    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    output: float = 0.0
    flops: float = 0.0
    summed: float = 0.0
    num_summed: int = 0
    used: bool = False


@dataclass(kw_only=True)
class _Look:
    windows: list[_Window]
    given_bytes: float
    buffer_bytes: float
    input_bytes: float
    trained_bytes: float
    state_bytes: float
    update_bytes: float


def _looked_at(
    make: Callable[[], nn.Module],
    inputs: Sequence[Input],
    targets: Tensor,
    task: Task,
    step: Step,
    rows: int,
    alone: bool,
    plan: TensorPlan,
    tensor: int,
) -> _Look:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model = make().train()
        for module in () if alone else model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = UnaskedBatchNorm
        given_bytes = _bytes([*model.parameters(), *model.buffers()])
        summed = localize(model, plan, tensor) if tensor > 1 else []
        batch = {each.name: torch.ones(rows, *each.shape, dtype=getattr(torch, each.dtype)) for each in inputs}
        wanted = torch.zeros(rows, *targets.shape[1:], dtype=targets.dtype)
        forward = ForwardPass(model, replace(step, compile="none"), "cpu")
        watch = _Watch(model, [*batch.values(), wanted], summed)
        with watch:
            with watch.modules():
                loss = task.loss(forward(batch), wanted)
            watch.turn()
            torch.autograd.backward(loss)
            del loss
        watch.settle(model)
        state_bytes, update_bytes = _updated(model, step)
        return _Look(
            windows=[each for each in watch.windows if each.used or each.weights],
            given_bytes=given_bytes,
            buffer_bytes=_bytes(model.buffers()),
            input_bytes=_bytes([*batch.values(), wanted]),
            trained_bytes=_bytes(parameter for parameter in model.parameters() if parameter.requires_grad),
            state_bytes=state_bytes,
            update_bytes=update_bytes,
        )


def _updated(model: nn.Module, step: Step) -> tuple[float, float]:
    """Bytes of the optimizer's states, and what a second update has at a time besides them."""
    kernels = step.optimizer_kernels
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=kernels == "fused", foreach=kernels == "foreach")
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    watch = _Watch(model, [*states, *(parameter.grad for parameter in trained if parameter.grad is not None)])
    with watch:
        optimizer.step()
    return _bytes(states), watch.most


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows memory from when an operator makes it until nobody has it any more."""

    def __init__(self, model: nn.Module, given: Sequence[Tensor], summed: Sequence[nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._summed = {id(module) for module in summed}
        self._model, self._blocks = model, apart(model)
        self.windows = [_Window(inside=False, begins=False, first_node=0)]
        self._given = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers(), *given)}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._live: dict[int, tuple[int, int]] = {}  # piece -> size, window of the forward pass or _OUTSIDE
        self._pieces: dict[int, int] = {}  # storage -> piece
        self._story: list[tuple[int, bool, int, int]] = []  # window, backward, piece, bytes that came or went
        self._num_pieces = 0
        self._window, self._backward = 0, False
        self.most = 0
        self._now = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        if self._backward:
            self._follow_backward()
        window = self.windows[self._window]
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        counted = flop_registry.get(function.overloadpacket) if hasattr(function, "overloadpacket") else None
        if counted is not None:
            window.flops += counted(*args, **(kwargs or {}), out_val=outputs)
        return outputs

    def _follow_backward(self) -> None:
        """Finds whose gradients are calculated, by the number of the node."""
        node = torch._C._current_autograd_node()
        if node is None:
            return
        number = node._sequence_nr()
        if self._first_backward_node <= number:  # accumulates a gradient, or calculates an activation again
            return
        while self.windows[self._window].first_node > number:
            self._window -= 1
        while self._window + 1 < len(self.windows) and self.windows[self._window + 1].first_node <= number:
            self._window += 1

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._given or key in self._known:
            return
        piece, size = self._num_pieces, storage.nbytes()
        self._num_pieces += 1
        self._known[key] = weakref.ref(storage, lambda _: self._part(key, piece, size))
        self._pieces[key] = piece
        self._note(piece, size)
        self.windows[self._window].used = True

    def _part(self, key: int, piece: int, size: int) -> None:
        self._known.pop(key, None)
        self._pieces.pop(key, None)
        self._note(piece, -size)

    def _note(self, piece: int, change: int) -> None:
        self._now += change
        self.most = max(self.most, self._now)
        self._story.append((self._window, self._backward, piece, change))

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Where it is told which module calculates."""
        firsts = {id(module): number for number, block in enumerate(self._blocks) for module in block}
        heads = {id(block[0]) for block in self._blocks}
        seen: set[int] = set()
        stack: list[int] = []

        def turn(begins: bool) -> None:
            inside = bool(stack)
            node = torch._C._autograd._get_sequence_nr()
            last = self.windows[-1]
            if not last.used and not last.weights and last.first_node == node:
                begins = begins or (last.begins and inside)
                self.windows[-1] = _Window(inside=inside, begins=begins, first_node=node)
            else:
                self.windows.append(_Window(inside=inside, begins=begins, first_node=node))
            self._window = len(self.windows) - 1

        def enter(module: nn.Module, arguments: Any) -> None:
            begins = False
            if id(module) in firsts:
                stack.append(firsts[id(module)])
                begins = id(module) in heads
            turn(begins)
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.windows[-1].weights.append(_weight(parameter))

        def leave(module: nn.Module, arguments: Any, outputs: Any) -> None:
            window = self.windows[self._window]
            window.output = _bytes(each for each in tree_leaves(outputs) if isinstance(each, Tensor))
            if id(module) in self._summed:  # the outputs, and in the backward pass the gradients of inputs elsewhere
                window.summed += 2 * window.output
                window.num_summed += 2
            if id(module) in firsts:
                stack.pop()
            turn(False)

        with ExitStack() as hooks:
            for module in self._model.modules():
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            yield
        for parameter in self._model.parameters():
            if id(parameter) not in seen:
                self.windows[-1].weights.append(_weight(parameter))

    def turn(self) -> None:
        """The forward pass has ended, and the backward pass begins."""
        self._backward = True
        self._first_backward_node = torch._C._autograd._get_sequence_nr()

    def settle(self, model: nn.Module) -> None:
        """Works out the figures of each window from the story."""
        gradients = {
            self._pieces[key]
            for parameter in model.parameters()
            if parameter.grad is not None and (key := id(parameter.grad.untyped_storage())) in self._pieces
        }
        born: dict[int, int] = {}
        alive: dict[int, int] = {}
        turned = next((place for place, (_, backward, *_) in enumerate(self._story) if backward), len(self._story))
        for window, _, piece, change in self._story[:turned]:
            if change > 0:
                born[piece], alive[piece] = window, change
            else:
                alive.pop(piece, None)
        for piece, size in alive.items():
            self.windows[born[piece]].saved += size
        before = [0.0]
        for each in self.windows:
            before.append(before[-1] + each.saved)
        now = 0.0
        for window, backward, piece, change in self._story:
            if piece in gradients:
                continue
            now += change
            figures = self.windows[window]
            more = now - before[window]
            if backward:
                figures.backward = max(figures.backward, more)
            else:
                figures.forward = max(figures.forward, more)


def _weight(parameter: nn.Parameter) -> Weight:
    rows = parameter.shape[0] if parameter.ndim else 1
    columns = parameter.numel() // rows if parameter.ndim > 1 and rows else 0
    return Weight(_bytes([parameter]), max(1, rows), columns, parameter.requires_grad)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
