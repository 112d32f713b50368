"""Weights of a model that are held at zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hasten.artefacts.wrapper import Wrapper
from hasten.core.errors import PassError

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
"""Modules whose parameters of at least two axes are weights; norms, biases and bare parameters are none."""

End = Literal["first", "last"]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight tensor of a model.

    Attributes:
        layer: name of the module that it belongs to.
        name: of the parameter in the model.
        filters: number of the filter (of the row, in a linear layer) that an element belongs to; to be broadcast.
    """

    layer: str
    name: str
    tensor: Tensor
    filters: Tensor


def prunable(model: nn.Module, keep: Sequence[End], layers: tuple[type[nn.Module], ...] = LAYERS) -> list[Weight]:
    """The weights of the model's layers in the order of their declaration, without the ends that stay whole.

    Raises:
        PassError: none is left.
    """
    weights = list(_weights(model))
    ends = {"first": weights[:1], "last": weights[-1:]}
    whole = {each.layer for end in keep for each in ends[end]}
    found = [
        each for each in weights if each.layer not in whole and isinstance(model.get_submodule(each.layer), layers)
    ]
    if not found:
        raise PassError(
            f"{type(model).__name__} has no layer to prune: of its convolutions, linear layers and the like, "
            f"{len({each.layer for each in weights})} in number, pruning.keep={list(keep)} leaves none"
        )
    return found


class Masked(Wrapper):
    """A model whose dropped weights are set to zero again before every forward, whatever the optimizer made of them.

    The masks are buffers: a copy has its own, and a training is told from one with other masks.

    Args:
        dropped: name of a parameter -> True where it is held at zero.
    """

    def __init__(self, model: nn.Module, dropped: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._names = tuple(dropped)
        for place, drop in enumerate(dropped.values()):
            self.register_buffer(f"dropped{place}", drop)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        self.set_to_zero()
        return self.model(*inputs, **named)

    def set_to_zero(self) -> None:
        from hasten.distributed.parameters import own_part  # takes long to import

        for place, name in enumerate(self._names):
            weight, drop = own_part(self.model.get_parameter(name).data, self.get_buffer(f"dropped{place}"))
            weight.masked_fill_(drop, 0.0)  # not a product with a mask, which would leave negative zeros


def zeros_note(model: nn.Module) -> str:
    """How many of the parameters are zero, and what that saves."""
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    zeros = sum(int((parameter == 0).sum()) for parameter in parameters)
    return (
        f"{100 * zeros / total:.0f} % of the {total:,} parameters are zero: that saves bytes where "
        "engine.compressed=true, none in the dense file, and no time"
    )


def _weights(model: nn.Module) -> Iterator[Weight]:
    """One that several layers share comes once."""
    seen: set[int] = set()
    for layer, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, LAYERS) else ():
            if parameter.ndim > 1 and not name.startswith("bias") and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(
                    layer=layer,
                    name=f"{layer}.{name}".removeprefix("."),
                    tensor=parameter,
                    filters=_filters(module, parameter),
                )


def _filters(module: nn.Module, weight: Tensor) -> Tensor:
    first, second, *rest = weight.shape
    if isinstance(module, _ConvTransposeNd):  # (inputs, outputs of a group, ...)
        group = torch.arange(first) // (first // module.groups)
        return (group[:, None] * second + torch.arange(second)).view(first, second, *(1 for _ in rest))
    return torch.arange(first).view(first, 1, *(1 for _ in rest))
