"""What can go from a model, by any kind of group, and taking it away."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.core.errors import PassError
from hasten.passes.pruning import dependencies, recurrent
from hasten.passes.pruning.groups import Group, Removal

_STRAY, _ROUNDING = 1e-2, 1e-5
"""How far a model without a unit may be from one in which the unit is silent: relative to what silence changes, and to
the outputs."""
_FAILURES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The groups of a model, in the order in which it declares their layers.

    Attributes:
        notes: what stays whole though units of its kind go elsewhere, one sentence each.
    """

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()


def structure(model: nn.Module, example: Mapping[str, Tensor], *, round_to: int, heads: bool) -> Structure:
    """Looks for groups in a copy of the model.

    Raises:
        PassError: torch-pruning can't follow the model.
    """
    probed = copy.deepcopy(model).eval()
    try:
        with dependencies.tracing(probed):
            found = dependencies.find(probed, example, round_to, heads=heads)
    except _FAILURES as error:
        raise _not_followed(model, error) from error
    found += recurrent.find(probed, example, round_to)
    place = {name: number for number, (name, _) in enumerate(probed.named_modules())}
    found.sort(key=lambda group: place[group.name])
    whole = _indispensable(probed, [group for group in found if group.kind != "channels"], example)
    notes = [f"{group.kind} of {group.name} stay whole: the model counts on all {group.num_units}." for group in whole]
    return Structure(groups=tuple(group for group in found if group not in whole), notes=tuple(notes))


def without(model: nn.Module, example: Mapping[str, Tensor], groups: Sequence[Group], removed: Removal) -> nn.Module:
    """A copy of the model in eval mode that lacks the units.

    Raises:
        PassError: torch-pruning can't cut the model.
    """
    by_name = {group.name: group for group in groups}
    pruned = copy.deepcopy(model).eval()
    stacks = {name: units for name, units in removed.items() if by_name[name].kind == "hidden units"}
    others = {name: units for name, units in removed.items() if name not in stacks}
    try:
        if others:
            with dependencies.tracing(pruned):
                dependencies.cut(pruned, example, by_name, others)
    except _FAILURES as error:
        raise _not_followed(model, error) from error
    recurrent.cut(pruned, by_name, stacks)
    return pruned


def cut_channels(groups: Sequence[Group], removed: Removal) -> dict[str, list[int]]:
    """Layer -> its channels that go, as JSON-able data; of a stack `name.l0` and so on."""
    cut = {}
    for group in groups:
        for chain, units in enumerate(removed.get(group.name, ())):
            name = group.name if group.chains == 1 else f"{group.name}.l{chain}"
            cut[name] = sorted(group.channels[units].flatten().tolist())
    return cut


def check_outputs(model: nn.Module, pruned: nn.Module, example: Mapping[str, Tensor]) -> None:
    """
    Raises:
        PassError: the pruned model does not run, or gives outputs of another shape.
    """
    try:
        with torch.no_grad():
            given, wanted = (forward(side, example).shape for side in (pruned, copy.deepcopy(model).eval()))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise PassError(f"{type(model).__name__} does not run with fewer channels: {reason}") from error
    if given != wanted:
        raise PassError(f"{type(model).__name__} gives {tuple(given)} with fewer channels instead of {tuple(wanted)}")


def _indispensable(model: nn.Module, groups: Sequence[Group], example: Mapping[str, Tensor]) -> list[Group]:
    """The groups of which the model needs every unit.

    torch-pruning knows what channels do; that heads and hidden units are laid out as usual has to be tried.
    """
    groups = [group for group in groups if group.num_units > 1]
    if not groups or _can_do_without(model, groups, example):  # all at once: each try traces the model again
        return []
    return [group for group in groups if not _can_do_without(model, [group], example)]


def _can_do_without(model: nn.Module, groups: Sequence[Group], example: Mapping[str, Tensor]) -> bool:
    """Whether the model without one unit of each group gives what it gives when these units are silent."""
    silent = copy.deepcopy(model)
    for each in (each for group in groups for each in group.slices if each.reads):
        silent.get_parameter(each.parameter).data.index_fill_(each.axis, each.places[each.units == 0], 0.0)
    removed = {group.name: torch.zeros(group.chains, 1, dtype=torch.int64) for group in groups}
    try:
        with torch.no_grad():
            before, wanted = forward(model, example), forward(silent, example)
            given = forward(without(model, example, groups, removed), example)
    except (PassError, RuntimeError, ValueError, IndexError):
        return False
    if given.shape != wanted.shape:
        return False
    allowed = _STRAY * (wanted - before).abs().max() + _ROUNDING * before.abs().max()
    return bool((given - wanted).abs().max() <= allowed)


def _not_followed(model: nn.Module, error: Exception) -> PassError:
    reason = str(error).partition("\n")[0]
    return PassError(f"the channels of {type(model).__name__} can't be followed by torch-pruning: {reason}")
