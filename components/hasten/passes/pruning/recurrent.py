"""Hidden units of recurrent layers that can go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.passes.pruning.groups import Group, Removal, Slice


def find(model: nn.Module, example: Mapping[str, Tensor], round_to: int) -> list[Group]:
    """One group a stack of unidirectional layers whose last output goes into linear or other recurrent layers.

    All layers of a stack have one size, so equally many units of each go; which ones is up to each layer.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and not module.bidirectional and not module.proj_size:
            readers = _readers(model, module, example)
            if readers:
                found.append(_group(name, module, readers, round_to))
    return found


def cut(model: nn.Module, groups: Mapping[str, Group], removed: Removal) -> None:
    """Removes units of such groups from the model itself."""
    for name, units in removed.items():
        group = groups[name]
        for each in group.slices:
            gone = each.places[torch.isin(each.units, units[each.chain])]
            _remove(model, each, gone)
        number = units.shape[1]
        module = model.get_submodule(name)
        assert isinstance(module, nn.RNNBase)
        module.hidden_size -= number
        for reader in {each.parameter.rpartition(".")[0] for each in group.slices if each.reads} - {name}:
            layer = model.get_submodule(reader)
            attribute = "input_size" if isinstance(layer, nn.RNNBase) else "in_features"
            setattr(layer, attribute, getattr(layer, attribute) - number)


def _remove(model: nn.Module, part: Slice, gone: Tensor) -> None:
    """Assigns a shorter parameter, which recurrent layers take into their list of weights."""
    layer, _, name = part.parameter.rpartition(".")
    module, old = model.get_submodule(layer), model.get_parameter(part.parameter)
    stays = torch.ones(old.shape[part.axis], dtype=torch.bool)
    stays[gone] = False
    shorter = old.detach().index_select(part.axis, stays.nonzero().flatten())
    setattr(module, name, nn.Parameter(shorter, old.requires_grad))


def _group(name: str, module: nn.RNNBase, readers: list[str], round_to: int) -> Group:
    hidden, units = module.hidden_size, torch.arange(module.hidden_size)
    slices: list[Slice] = []
    for layer in range(module.num_layers):
        num_gates = module.get_parameter(f"weight_hh_l{layer}").shape[0] // hidden
        gates = torch.arange(num_gates * hidden)
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())):
            slices.append(
                Slice(
                    parameter=f"{name}.{kind}_l{layer}".removeprefix("."),
                    axis=0,
                    places=gates,
                    units=gates % hidden,
                    chain=layer,
                    judged=kind.startswith("weight"),
                )
            )
        last = layer == module.num_layers - 1
        following = readers if last else [f"{name}.weight_ih_l{layer + 1}".removeprefix(".")]
        for parameter in (f"{name}.weight_hh_l{layer}".removeprefix("."), *following):
            slices.append(Slice(parameter=parameter, axis=1, places=units, units=units, chain=layer, reads=True))
    return Group(
        name=name,
        kind="hidden units",
        num_units=hidden,
        multiple=round_to,
        slices=tuple(slices),
        channels=units[:, None],
        chains=module.num_layers,
    )


def _readers(model: nn.Module, module: nn.RNNBase, example: Mapping[str, Tensor]) -> list[str]:
    """The weights of linear and recurrent layers that take the last layer's states as they are.

    They are found by putting numbers that nothing else has in place of the states.
    """
    marks = 1e6 + torch.arange(module.hidden_size, dtype=torch.float32)
    found: list[str] = []

    def mark(_: nn.Module, __: Any, outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        states, final = outputs
        if not isinstance(states, Tensor):  # of packed sequences, which nothing here looks into
            return outputs
        marked = tuple(marks.expand_as(each) for each in final) if isinstance(final, tuple) else marks.expand_as(final)
        return marks.expand_as(states), marked

    def look(name: str, weight: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0] if inputs else None
            if isinstance(given, Tensor) and given.shape[-1:] == marks.shape and bool((given == marks).all()):
                found.append(f"{name}.{weight}".removeprefix("."))

        return hook

    with _hooks() as hooks, torch.no_grad():
        hooks.append(module.register_forward_hook(mark))
        for name, other in model.named_modules():
            if isinstance(other, nn.Linear | nn.RNNBase) and other is not module:
                weight = "weight" if isinstance(other, nn.Linear) else "weight_ih_l0"
                hooks.append(other.register_forward_pre_hook(look(name, weight)))
        forward(model.eval(), example)
    return list(dict.fromkeys(found))


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
