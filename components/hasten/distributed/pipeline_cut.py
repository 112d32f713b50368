"""Where the sequence of a model's layers is cut into the stages of a pipeline.

The model is traced into a list of blocks, what each of them costs is measured, and of all contiguous cuts the one whose
most expensive stage is the cheapest is taken. What is used later than in the next stage (shortcuts, masks) is handed on
from stage to stage.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from statistics import median
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from hasten.artefacts.module import forward
from hasten.core.errors import HastenError, PassError, first_line
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.tensor import fits

TOLERANCE = 0.05
"""Share by which a stage may cost more than in the best cut where less is handed over then: about what measured times
vary by."""
_BALANCED = 1.1
"""Cost of the most expensive stage, as a multiple of the mean, from which blocks are divided further."""
_REPEATS = 3
_IN_VAIN = 2
"""Blocks that are looked into one after the other without a better cut before it is left at that."""

_log = logging.getLogger(__name__)
_SHAPES = {"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement", "stride"}
_KINDS = {"dtype", "device", "layout", "is_floating_point"}
"""Attributes and methods of tensors whose values are the same for all micro-batches."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


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
            if derived or accessed in _SHAPES | _KINDS
            else None
        )


def _apart(value: Any) -> Any:
    """A tensor with a history of its own."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _writable(value: Any) -> Any:
    return _apart(value).clone() if isinstance(value, Tensor) else value


def _shaped(value: Tensor) -> Shaped:
    return Shaped(shape=tuple(value.shape), dtype=value.dtype, learns=value.requires_grad)


def divided(
    costs: Sequence[float], moved_bytes: Sequence[int | None], trained: Sequence[bool], stages: int
) -> list[int] | None:
    """Borders of the stages of a sequence of blocks, from 0 to the number of blocks; None where there are too few.

    The most expensive stage is as cheap as it can be, or up to `TOLERANCE` more where fewer bytes are handed over then;
    of all such cuts it is the one with the fewest. Every stage has something that is trained.

    Args:
        costs: of each block, 0 or more.
        moved_bytes: where it is cut before the block; None where it can't be.
        trained: whether the block has parameters that learn.
        stages: 1 or more.
    """
    before, learning = [0.0, *accumulate(costs)], [0, *accumulate(map(int, trained))]
    moved = {place: number for place, number in enumerate(moved_bytes) if place and number is not None}
    places = [0, *moved, len(costs)]

    def cost(start: int, end: int) -> float:
        return before[end] - before[start] if learning[end] > learning[start] else math.inf

    cheapest = _cheapest(places, stages, cost, max)
    if cheapest is None:
        return None
    limit = (1 + TOLERANCE) * max(cost(start, end) for start, end in pairwise(cheapest))

    def handed(start: int, end: int) -> float:
        return moved.get(end, 0) if cost(start, end) <= limit else math.inf

    return _cheapest(places, stages, handed, operator.add)


def _cheapest(
    places: Sequence[int],
    stages: int,
    cost: Callable[[int, int], float],
    joined: Callable[[float, float], float],
) -> list[int] | None:
    """Borders at some of the places for which the joined costs of the stages are the least; None where none is finite.

    By dynamic programming over the number of stages.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for _ in range(stages):
        found: dict[int, tuple[float, list[int]]] = {}
        for end in places[1:]:
            options = [
                (joined(so_far, cost(start, end)), borders) for start, (so_far, borders) in best.items() if start < end
            ]
            total, borders = min(options, default=(math.inf, []))
            if total < math.inf:
                found[end] = (total, [*borders, end])
        best = found
    return best[places[-1]][1] if places[-1] in best else None


class Plan(NamedTuple):
    """Of a pipeline, the same on all processes.

    Attributes:
        given: name -> what the block or the input gives for a micro-batch.
        overwrites: for each stage whether it changes in place what it takes.
    """

    cut: Cut
    given: dict[str, Given]
    overwrites: list[bool]


def planned(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stages: int,
    *,
    cut: Cut | None = None,
    inside: Callable[[], AbstractContextManager[object]] = nullcontext,
    seconds: float = math.inf,
    plan: TensorPlan = WHOLE,
    what: str = "the model",
) -> Plan:
    """Cuts a model in training mode, which is left as it was, as are the generators.

    Args:
        inputs: of a micro-batch.
        cut: to be taken where it fits the model; None for one by measured times.
        inside: the context of forward passes, such as autocast.
        seconds: after which nothing else is tried.
        plan: by which layers are divided among processes; without one, a block that is too expensive to be cut well is
            looked into.
        what: is cut, for errors.

    Raises:
        PassError: the model can't be cut into so many stages, or its stages one after the other don't do what it does.
    """
    try:
        traced = None if cut is None else _fitting(model, list(inputs), cut, stages)
        if traced is None or cut is None:
            traced, cut = _chosen(model, inputs, stages, inside, monotonic() + seconds, plan, what)
        given = measured(traced, [*inputs.values()], inside=inside, repeats=0).given
        return Plan(cut=cut, given=given, overwrites=_checked(traced, cut, given, inputs, what))
    except HastenError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise PassError(f"{what} can't be cut into the stages of a pipeline: {first_line(error)}") from error


def _fitting(model: nn.Module, names: Sequence[str], cut: Cut, stages: int) -> Traced | None:
    """The model as the cut wants it traced; None where it is a cut of another."""
    modules = dict(model.named_modules())
    if len(cut.before) != stages - 1 or any(name not in modules for name in cut.opened):
        return None
    traced = Traced(model, names, cut.opened)
    return traced if set(cut.before) <= set(traced.names()) else None


def _chosen(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stages: int,
    inside: Callable[[], AbstractContextManager[object]],
    deadline: float,
    plan: TensorPlan,
    what: str,
) -> tuple[Traced, Cut]:
    traced: Traced | None = Traced(model, list(inputs))
    best: tuple[float, Traced, list[int]] | None = None
    closed: set[str] = set()
    in_vain = 0
    while traced is not None:
        latest = traced
        costs, given = measured(traced, [*inputs.values()], inside=inside, deadline=deadline)
        moved, trained = traced.moved_bytes(given, plan), traced.trained()
        borders = divided(costs, moved, trained, stages)
        dearest = range(len(costs))
        mean = sum(costs) / stages
        if borders is not None:
            start, end = max(pairwise(borders), key=lambda pair: sum(costs[slice(*pair)]))
            dearest, cost = range(start, end), sum(costs[start:end])
            in_vain = 0 if best is None or cost < (1 - TOLERANCE) * best[0] else in_vain + 1
            if best is None or cost < best[0]:
                best = (cost, traced, borders)
            if cost <= _BALANCED * mean or in_vain == _IN_VAIN or monotonic() > deadline:
                break
        large = [place for place in dearest if costs[place] > (_BALANCED - 1) * mean]
        large.sort(key=lambda place: -costs[place])
        traced = None if plan.layers else _deeper(traced, list(inputs), large, closed)
    if best is None:
        raise PassError(_too_few(latest, costs, moved, trained, stages, what))
    _, found, places = best
    return found, Cut(opened=found.opened, before=tuple(found.names()[place] for place in places[1:-1]))


def _deeper(traced: Traced, names: Sequence[str], places: Sequence[int], closed: set[str]) -> Traced | None:
    """The model with the first of some blocks looked into that can be, None where none can; adds to `closed`."""
    for place in places:
        node = traced.blocks[place]
        if traced.holds_modules(node) and (name := str(node.target)) not in closed:
            closed.add(name)
            try:
                return Traced(traced.model, names, (*traced.opened, name))
            except Exception as error:  # whatever a user's module raises that is no fixed sequence
                _log.debug("%s stays whole: %s", name, error)
    return None


def _too_few(
    traced: Traced,
    costs: Sequence[float],
    moved: Sequence[int | None],
    trained: Sequence[bool],
    stages: int,
    what: str,
) -> str:
    most = next((fewer for fewer in range(stages - 1, 0, -1) if divided(costs, moved, trained, fewer)), 0)
    shared = traced.shared()
    reason = f": {', '.join(shared)} can't be in several" if shared else ""
    return f"{what} can be cut into {most} stages at most, and the pipeline needs {stages}{reason}"


def _checked(
    traced: Traced, cut: Cut, given: Mapping[str, Given], inputs: Mapping[str, Tensor], what: str
) -> list[bool]:
    """Whether each stage overwrites what it takes, by running them one after the other."""
    overwrites = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        wanted = forward(copy.deepcopy(traced.model), inputs)
        torch.set_rng_state(state)
        values: tuple[Tensor, ...] = tuple(inputs.values())
        for stage in Traced(copy.deepcopy(traced.model), list(inputs), cut.opened).stages(cut, given):
            values = tuple(value.clone() for value in values)
            outputs = stage(*values)
            overwrites.append(any(value._version for value in values))
            values = outputs if isinstance(outputs, tuple) else (outputs,)
    if not torch.allclose(values[0].float(), wanted.float(), rtol=1e-4, atol=1e-6):
        raise PassError(
            f"{what} can't be cut into the stages of a pipeline: one after the other they give other outputs than it"
        )
    return overwrites
