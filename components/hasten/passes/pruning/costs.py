"""What a model costs at any widths of its groups, exactly, without building it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hasten.artefacts.module import forward
from hasten.passes.pruning.groups import Allocation, Group


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Sizes of all tensors as linear functions of what groups keep, and what an element of each costs.

    A cost is the sum over tensors of their number of elements times a factor. Attention products take part as tensors
    with one element a head.

    Attributes:
        groups: in the order of the columns of `lost`.
        sizes: (tensors, axes), filled up with ones.
        lost: (tensors, axes, groups), places that go with one unit.
        uses: (tensors,), multiply-adds per row and element.
        stored: (tensors,), 1 for parameters, 0 for products.
    """

    groups: tuple[Group, ...]
    sizes: NDArray[np.float64]
    lost: NDArray[np.float64]
    uses: NDArray[np.float64]
    stored: NDArray[np.float64]

    def parameters(self, kept: Allocation) -> float:
        """Elements of all parameters."""
        return float(self.stored @ self._elements(kept))

    def flops(self, kept: Allocation) -> float:
        """Floating-point operations per row of convolutions, linear and recurrent layers and attention products: two
        for each multiply-add."""
        return float(2 * self.uses @ self._elements(kept))

    def shape(self, group: Group, kept: Allocation) -> tuple[tuple[float, ...], ...]:
        """What decides how a change of the group's width changes the latency: equal for groups that do equal work."""
        column = self.groups.index(group)
        rows = np.flatnonzero(self.lost[:, :, column].any(axis=1))
        sizes = self._sizes(kept)
        described = [(*sizes[row], *self.lost[row, :, column], self.uses[row]) for row in rows]
        return tuple(sorted(tuple(float(value) for value in each) for each in described))

    def _sizes(self, kept: Allocation) -> NDArray[np.float64]:
        gone = np.array([group.num_units - kept[group.name] for group in self.groups], dtype=np.float64)
        return self.sizes - self.lost @ gone

    def _elements(self, kept: Allocation) -> NDArray[np.float64]:
        elements: NDArray[np.float64] = self._sizes(kept).prod(axis=1)
        return elements


def costs(model: nn.Module, groups: Sequence[Group], example: Mapping[str, Tensor]) -> Costs:
    """Reads the sizes off the model and counts how often each weight is used for a row of the example."""
    parameters = dict(model.named_parameters())
    names = {name: row for row, name in enumerate(parameters)}
    products = [group for group in groups if group.products_per_unit]
    num_tensors = len(parameters) + len(products)
    num_axes = max([1, *(parameter.ndim for parameter in parameters.values())])
    sizes = np.ones((num_tensors, num_axes))
    lost = np.zeros((num_tensors, num_axes, len(groups)))
    uses, stored = np.zeros(num_tensors), np.zeros(num_tensors)
    for name, parameter in parameters.items():
        sizes[names[name], : parameter.ndim] = parameter.shape
        stored[names[name]] = 1
    for name, number in _uses(model, example).items():
        uses[names[name]] = number
    for column, group in enumerate(groups):
        for part in (each for each in group.slices if each.parameter in names):  # what is tied has one name alone
            lost[names[part.parameter], part.axis, column] += len(part.places) / group.num_units / part.blocks
    for row, group in enumerate(products, start=len(parameters)):
        sizes[row, 0], lost[row, 0, groups.index(group)] = group.num_units, 1
        uses[row] = group.products_per_unit
    return Costs(groups=tuple(groups), sizes=sizes, lost=lost, uses=uses, stored=stored)


def _uses(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, float]:
    """Weight -> multiply-adds per row that each of its elements takes part in."""
    found: dict[str, float] = {}
    model = copy.deepcopy(model).eval()
    rows = len(next(iter(example.values())))

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
            for weight, number in _module_uses(module, inputs, outputs):
                key = f"{name}.{weight}".removeprefix(".")
                found[key] = found.get(key, 0.0) + number / rows

        return hook

    with _hooked(model, note), torch.no_grad():
        forward(model, example)
    return {name: number for name, number in found.items() if name in dict(model.named_parameters())}


def _module_uses(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> Iterator[tuple[str, float]]:
    if isinstance(module, _ConvTransposeNd):
        yield "weight", inputs[0].numel() / module.in_channels
    elif isinstance(module, _ConvNd):
        yield "weight", outputs.numel() / module.out_channels
    elif isinstance(module, nn.Linear):
        yield "weight", outputs.numel() / module.out_features
    elif isinstance(module, nn.RNNBase):
        for name, _ in module.named_parameters():
            if name.startswith("weight"):
                yield name, math.prod(outputs[0].data.shape[:-1])  # `data` of a tensor or of packed sequences
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "out_proj.weight"):
            yield name, math.prod(outputs[0].shape[:-1])


@contextmanager
def _hooked(model: nn.Module, note: Any) -> Iterator[None]:
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
