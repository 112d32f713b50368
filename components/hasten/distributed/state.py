"""The state of an optimizer by the names of parameters, which are the same in every layout of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PREFIX = "optimizer."
_OF_LAYOUT = ("params", "foreach", "fused", "capturable", "differentiable")
"""What a group of parameters has that is no state of the training: which they are, and with which kernels."""
_OF_EACH_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")
"""What a schedule of the learning rate has one of for each group of parameters."""


def optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """The state of each parameter, or of the share of it that is in this process, by what it is and its name."""
    return {
        f"{_PREFIX}{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def room(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors like `optimizer_tensors`, to be filled with those that have these names; of this process' parameters."""
    kinds: dict[str, list[str]] = {}
    parameters = dict(model.named_parameters())
    for full in names:
        if full.startswith(_PREFIX):
            kind, _, name = full.removeprefix(_PREFIX).partition(".")
            kinds.setdefault(name, []).append(kind)
    return {
        f"{_PREFIX}{kind}.{name}": torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name].detach())
        for name in kinds
        if name in parameters
        for kind in kinds[name]
    }


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Gives an optimizer the state that `optimizer_tensors` and `optimizer_settings` have told."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        kind, _, name = full.removeprefix(_PREFIX).partition(".")
        kept.setdefault(name, {})[kind] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {
                number: kept[names[parameter]]
                for number, parameter in enumerate(parameters)
                if names[parameter] in kept
            },
            "param_groups": [group | settings for group in optimizer.state_dict()["param_groups"]],
        }
    )


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Such as the learning rate; the same for all groups of parameters, of which another layout may have others."""
    return {name: value for name, value in optimizer.param_groups[0].items() if name not in _OF_LAYOUT}


def schedule_for(state: Mapping[str, Any], num_groups: int) -> dict[str, Any]:
    """The state of a schedule of the learning rate for so many groups of parameters."""
    values: dict[str, Sequence[Any]] = {name: state[name] for name in _OF_EACH_GROUP if name in state}
    return {**state, **{name: [*value[:1]] * num_groups for name, value in values.items()}}
