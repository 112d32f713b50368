"""A model as a sequence of blocks, any part of which can be a stage of a pipeline."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hasten.artefacts.module import forward
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.tensor import fits


class Shaped(NamedTuple):
    """A tensor that a node gives for a micro-batch.

    Attributes:
        learns: gradients flow back through it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    learns: bool

    @property
    def moved_bytes(self) -> int:
        """To the next stage, and of its gradient back."""
        return math.prod(self.shape) * self.dtype.itemsize * (2 if self.learns else 1)

    def example(self) -> Tensor:
        """Of this shape, without content."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=self.learns)


class Plain(NamedTuple):
    """What a node gives that is no tensor and follows from shapes, such as a length."""

    value: Any


Given = Shaped | Plain | None
"""Of a node; None for what can't be handed from process to process, such as a tuple of tensors."""


class Cut(NamedTuple):
    """How a model is divided.

    Attributes:
        opened: names of modules that are no blocks but sequences of what is in them.
        before: names of the blocks before which it is cut, in order; there is one stage more.
    """

    opened: tuple[str, ...]
    before: tuple[str, ...]


class Traced:
    """A model as a sequence of blocks and of what is calculated between them.

    Blocks are the modules inside a model but for plain sequences of modules, whose elements are.

    Args:
        names: of the model's inputs.
        opened: names of modules that are looked into.

    Attributes:
        blocks: what is calculated, in order.
        result: the one that gives the model's output.

    Raises:
        Exception: of whatever kind, the model's forward pass is no fixed sequence.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], opened: Sequence[str] = ()) -> None:
        self.model, self.opened = model, tuple(opened)
        self._graph = _Tracer(names, opened).trace(model)
        nodes = list(self._graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self.blocks = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
        self.result: fx.Node = nodes[-1].args[0]
        self._places = {node: place for place, node in enumerate(self.blocks)} | dict.fromkeys(self._inputs, -1)
        self._last_uses = {
            node: max((self._places.get(user, len(self.blocks)) for user in node.users), default=-1)
            for node in self._places
        }

    def names(self) -> list[str]:
        """Of the blocks."""
        return [node.name for node in self.blocks]

    def of(self, model: nn.Module) -> fx.GraphModule:
        """The same sequence of a copy of the model."""
        return fx.GraphModule(model, self._graph)

    def handed(self, place: int) -> list[fx.Node]:
        """What the blocks from a place on take from those before it, in order."""
        return [node for node, made in self._places.items() if made < place <= self._last_uses[node]]

    def moved_bytes(self, given: Mapping[str, Given], plan: TensorPlan = WHOLE) -> list[int | None]:
        """That are handed over where it is cut before each of the blocks; None where it can't be.

        It can't where there is nothing before, where something is handed over that is no tensor, where trained
        parameters or statistics are used on either side, and between layers that take and give parts of a tensor.

        Args:
            plan: by which layers are divided among processes.
        """
        together = [*self._together(), *self._in_parts(plan)]
        found: list[int | None] = []
        for place in range(len(self.blocks)):
            values = [given[node.name] for node in self.handed(place)]
            apart = place and not any(first < place <= last for first, last in together)
            if apart and None not in values:
                found.append(sum(each.moved_bytes for each in values if isinstance(each, Shaped)))
            else:
                found.append(None)
        return found

    def trained(self) -> list[bool]:
        """For each block whether it has parameters that learn."""
        return [
            any(
                isinstance(each, nn.Parameter) and each.requires_grad
                for each in (*self._state(node), *self._read(node))
            )
            for node in self.blocks
        ]

    def stage(self, start: int, end: int, given: Mapping[str, Given]) -> fx.GraphModule:
        """The blocks in `range(start, end)`: the very modules of the model, by their names.

        It takes the tensors of `taken(start)` and gives those of `taken(end)`, the last stage the model's output.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in self._tensors(start, given)}

        def copied(node: fx.Node) -> Any:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                return graph.node_copy(node)
            known = given[node.name]
            assert isinstance(known, Plain)
            return known.value

        for node in self.blocks[start:end]:
            copies[node] = graph.node_copy(node, copied)
        last = end == len(self.blocks)
        graph.output(copies[self.result] if last else tuple(copies[node] for node in self._tensors(end, given)))
        return fx.GraphModule(self.model, graph)

    def taken(self, place: int, given: Mapping[str, Given]) -> list[Shaped]:
        """Tensors that are handed over before a block: to the first, the model's inputs; after the last, its output."""
        nodes = [self.result] if place == len(self.blocks) else self._tensors(place, given)
        return [each for node in nodes if isinstance(each := given[node.name], Shaped)]

    def stages(self, cut: Cut, given: Mapping[str, Given]) -> list[fx.GraphModule]:
        return [self.stage(start, end, given) for start, end in pairwise(self.borders(cut))]

    def borders(self, cut: Cut) -> list[int]:
        """Places at which the stages begin, and the number of blocks."""
        names = self.names()
        return [0, *(names.index(name) for name in cut.before), len(names)]

    def shared(self) -> list[str]:
        """Names of trained parameters that several blocks use."""
        used = Counter(
            id(each)
            for node in self.blocks
            for each in {id(each): each for each in self._used(node)}.values()
            if each.requires_grad
        )
        return [name for name, each in self.model.named_parameters() if used[id(each)] > 1]

    def holds_modules(self, node: fx.Node) -> bool:
        """Whether the block is a module with others in it that may be looked into."""
        if node.op != "call_module":
            return False
        module = self.model.get_submodule(str(node.target))
        return not type(module).__module__.startswith("torch.") and any(True for _ in module.children())

    def _tensors(self, place: int, given: Mapping[str, Given]) -> list[fx.Node]:
        if place == 0:
            return self._inputs
        return [node for node in self.handed(place) if isinstance(given[node.name], Shaped)]

    def _state(self, node: fx.Node) -> Iterator[Tensor]:
        """Parameters and buffers of the module that the block is."""
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            yield from module.parameters()
            yield from module.buffers()

    def _read(self, node: fx.Node) -> Iterator[Tensor]:
        """Parameters and buffers that the block reads as they are."""
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                value = operator.attrgetter(str(source.target))(self.model)
                if isinstance(value, Tensor):
                    yield value

    def _used(self, node: fx.Node) -> Iterator[Tensor]:
        yield from self._state(node)
        yield from self._read(node)

    def _in_parts(self, plan: TensorPlan) -> Iterator[tuple[int, int]]:
        """First and last place of blocks between which each process has parts of what is calculated."""
        first = None
        for place, node in enumerate(self.blocks):
            name = str(node.target) if node.op == "call_module" else ""
            word = next((word for pattern, word in plan.layers.items() if fits(name, pattern)), "")
            if word == "column" and first is None:
                first = place
            elif word == "row" and first is not None:
                yield first, place
                first = None

    def _together(self) -> list[tuple[int, int]]:
        """First and last place of blocks that can't be apart, since both change the same parameters or statistics."""
        places: dict[int, list[int]] = {}
        for place, node in enumerate(self.blocks):
            changed = [each for each in self._state(node) if each.requires_grad or not isinstance(each, nn.Parameter)]
            for each in (*changed, *(value for value in self._read(node) if value.requires_grad)):
                places.setdefault(id(each), []).append(place)
        return [(found[0], found[-1]) for found in places.values() if found[0] != found[-1]]


class _Tracer(fx.Tracer):
    def __init__(self, names: Sequence[str], opened: Sequence[str]) -> None:
        super().__init__()
        self._names, self._opened = names, opened

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[nn.Module], Any], list[Any]]:
        inputs: dict[str, Any] = {name: self.create_proxy("placeholder", name, (), {}) for name in self._names}

        def run(model: nn.Module) -> Any:
            return forward(model, inputs)

        return run, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        sequence = type(m).forward is nn.Sequential.forward
        return bool(module_qualified_name) and not sequence and module_qualified_name not in self._opened
