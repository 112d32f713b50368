"""How much a unit matters: a channel, an attention head, a hidden unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hasten.core.errors import PassError
from hasten.core.interfaces import Bench
from hasten.passes.pruning.gradients import batch_gradients
from hasten.passes.pruning.groups import Group, Ranked, Slice

Importance = Literal["l1", "l2", "taylor", "bn_scale", "random"]


def rank(model: nn.Module, groups: Sequence[Group], importance: Importance, bench: Bench) -> list[Ranked]:
    """The groups with their units in order; without those that the importance can't judge.

    A unit's importance is the sum over all weights that go with it, of which each counts

    - `l1`, `l2`: its absolute value or square (Li et al. 2017, over the whole group as of Fang et al. 2023);
    - `taylor`: |w dL/dw|, the mean over batches of training rows: to first order what the loss changes by without it
      (Molchanov et al. 2019, eq. 8, with absolute values in place of squares);
    - `bn_scale`: |gamma| of batch normalization alone (Liu et al. 2017);
    - `random`: nothing; units get uniform numbers from the seed of the bench.

    With `taylor` a group counts what it is worth to the loss, with the others what it has of weight tensors.

    Raises:
        PassError: `bn_scale` for a model whose units run through no batch normalization.
    """
    if importance == "random":
        generator = torch.Generator().manual_seed(bench.seed)
        draws = [torch.rand(group.chains, group.num_units, generator=generator) for group in groups]
        return [Ranked.of(group, draw, _num_weights(group)) for group, draw in zip(groups, draws, strict=True)]
    elements = _elements(model, importance, bench)
    judged = [group for group in groups if any(_judges(each, elements) for each in group.slices)]
    if groups and not judged:
        raise PassError(
            f"pruning.importance=bn_scale needs batch normalization, and the units that {type(model).__name__} can "
            f"lose run through none: take l1, l2 or taylor"
        )
    ranked = []
    for group in judged:
        scores = unit_scores(group, elements)
        ranked.append(Ranked.of(group, scores, float(scores.sum()) if importance == "taylor" else _num_weights(group)))
    return ranked


def unit_scores(group: Group, elements: Mapping[str, Tensor]) -> Tensor:
    """Sums over what belongs to a unit, (chains, num_units).

    Args:
        elements: parameter -> what each of its elements counts, of its shape; those that count nothing left out.
    """
    scores = torch.zeros(group.chains, group.num_units, dtype=torch.float64)
    for each in group.slices:
        if _judges(each, elements):
            scores[each.chain].index_add_(0, each.units, _along(elements[each.parameter], each)[each.places])
    return scores


def _judges(each: Slice, elements: Mapping[str, Tensor]) -> bool:
    return each.judged and each.parameter in elements


def _along(values: Tensor, each: Slice) -> Tensor:
    """Sums over all axes but that of the slice; over its blocks one after another."""
    values = values.double().movedim(each.axis, 0)
    if each.blocks == 1:
        return values.reshape(len(values), -1).sum(1)
    # The blocks lie one after another on the other one of the first two axes.
    parts = values.reshape(len(values), each.blocks, -1).sum(2)
    return parts.T.flatten()


def _elements(model: nn.Module, importance: Importance, bench: Bench) -> dict[str, Tensor]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if importance == "taylor":
        return _first_order(model, weights, bench)
    if importance == "bn_scale":
        norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        return {name: weight.abs() for name, weight in weights.items() if name in norms}
    return {name: weight.abs().pow(1 if importance == "l1" else 2) for name, weight in weights.items()}


def _first_order(model: nn.Module, weights: Mapping[str, Tensor], bench: Bench) -> dict[str, Tensor]:
    totals = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    num_rows = 0
    for number, gradients in batch_gradients(model, bench.train, bench.task):
        num_rows += number
        for name, gradient in gradients.items():
            totals[name] += number * (weights[name] * gradient).abs()
    return {name: total / num_rows for name, total in totals.items()}


def _num_weights(group: Group) -> float:
    """Weight tensors that lose something: each is a layer whose function is damaged."""
    return float(len({(each.parameter, each.axis) for each in group.slices if each.judged}))
