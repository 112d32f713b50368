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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from time import monotonic
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.core.errors import HastenError, PassError, first_line
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.pipeline_cost import measured
from hasten.distributed.pipeline_trace import Cut, Given, Traced

TOLERANCE = 0.05
"""Share by which a stage may cost more than in the best cut where less is handed over then: about what measured times
vary by."""
_BALANCED = 1.1
"""Cost of the most expensive stage, as a multiple of the mean, from which blocks are divided further."""
_IN_VAIN = 2
"""Blocks that are looked into one after the other without a better cut before it is left at that."""

_log = logging.getLogger(__name__)


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
        found = None if cut is None else _fitting(model, inputs, cut, stages, inside, plan)
        if found is None:
            traced, cut = _chosen(model, inputs, stages, inside, monotonic() + seconds, plan, what)
            found = traced, cut, measured(traced, [*inputs.values()], inside=inside, repeats=0).given
        traced, cut, given = found
        return Plan(cut=cut, given=given, overwrites=_checked(traced, cut, given, inputs, what))
    except HastenError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise PassError(f"{what} can't be cut into the stages of a pipeline: {first_line(error)}") from error


def _fitting(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    cut: Cut,
    stages: int,
    inside: Callable[[], AbstractContextManager[object]],
    plan: TensorPlan,
) -> tuple[Traced, Cut, dict[str, Given]] | None:
    """The model as the cut wants it traced, and what it gives; None where it can't be cut like that."""
    modules = dict(model.named_modules())
    if len(cut.before) != stages - 1 or any(name not in modules or plan.layers for name in cut.opened):
        return None
    traced = Traced(model, list(inputs), cut.opened)
    if not set(cut.before) <= set(traced.names()):
        return None
    given = measured(traced, [*inputs.values()], inside=inside, repeats=0).given
    moved = traced.moved_bytes(given, plan)
    return (traced, cut, given) if all(moved[place] is not None for place in traced.borders(cut)[1:-1]) else None


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
