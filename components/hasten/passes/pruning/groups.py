"""What can be removed from a network: groups of units that go together, and where their weights lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Allocation = Mapping[str, int]
"""Group -> units that it keeps."""
Removal = Mapping[str, Tensor]
"""Group -> units that go, (chains, number) int64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """The places on one axis of one parameter that belong to the units of a group.

    Attributes:
        parameter: its name in the model.
        places: on the axis, (N,) int64; of the inputs of a grouped convolution, whose axis holds those of one of its
            `blocks` only, counted through all of them.
        units: that the places belong to, (N,) int64.
        chain: of the group that the units are counted in.
        reads: whether the parameter takes what the units give, so that zeros there silence them.
        judged: whether the importance of a unit looks at it: weights and scales, not biases.
    """

    parameter: str
    axis: int
    places: Tensor
    units: Tensor
    blocks: int = 1
    chain: int = 0
    reads: bool = False
    judged: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Units of one kind, of which any number may go while the model still runs: channels, attention heads, or hidden
    units of recurrent layers.

    Attributes:
        name: of the layer that stands for the group.
        num_units: so many there are.
        multiple: the number that stays is a multiple of this, or all.
        channels: of the layer `name` that a unit stands for, (num_units, K) int64.
        chains: lists of units of which equally many have to go, each its own: the layers of a recurrent stack.
        products_per_unit: multiply-adds per row of an attention's products, for one head.
    """

    name: str
    kind: Literal["channels", "heads", "hidden units"]
    num_units: int
    multiple: int
    slices: tuple[Slice, ...]
    channels: Tensor
    chains: int = 1
    products_per_unit: float = 0.0

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Numbers of units that may stay, the least first."""
        return (*range(self.multiple, self.num_units, self.multiple), self.num_units)

    def nearest(self, share: float, units: int | None = None) -> int:
        """The width nearest to the share of the units.

        Args:
            units: of which the share is meant, where the group has lost some already.
        """
        wanted = (self.num_units if units is None else units) * share
        rounded = min(self.num_units, max(self.multiple, round(wanted / self.multiple) * self.multiple))
        # All units are a width too, whatever they are a multiple of.
        return self.num_units if abs(self.num_units - wanted) < abs(rounded - wanted) else rounded


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """A group with its units in the order in which they go.

    Attributes:
        order: (chains, num_units) int64, the least important first.
        kept_share: of the group's importance that is left when n units of each chain are gone, (num_units + 1,).
        weight: what the loss of the group counts, beside that of others.
    """

    group: Group
    order: Tensor
    kept_share: NDArray[np.float64]
    weight: float

    @classmethod
    def of(cls, group: Group, scores: Tensor, weight: float) -> Ranked:
        """
        Args:
            scores: importance of each unit, (chains, num_units), at least 0.
        """
        scores = scores.double()
        if not scores.sum() > 0:  # nothing tells the units apart
            scores = torch.ones_like(scores)
        order = torch.argsort(scores, dim=1, stable=True)
        gone = scores.gather(1, order).cumsum(1).sum(0)
        shares = torch.cat([torch.zeros(1, dtype=torch.float64), gone]) / gone[-1]
        return cls(group=group, order=order, kept_share=np.clip(1 - shares.numpy(), 0, 1), weight=weight)

    def loss(self, kept: int) -> float:
        """-ln(share of the importance that stays), weighted.

        Summed over the layers of a network it is what LAMP (Lee et al. 2021) makes as small as it can, one weight after
        another: to first order the share that goes, and without bound where a layer loses all it has.
        """
        return -self.weight * float(np.log(max(self.kept_share[self.group.num_units - kept], 1e-12)))

    def least(self, number: int) -> Tensor:
        """The units that go first, (chains, number), sorted."""
        return self.order[:, :number].sort(dim=1).values


def removal(ranked: Iterable[Ranked], kept: Allocation) -> Removal:
    """The least important units of each group that has to lose some."""
    numbers = {each.group.name: each.group.num_units - kept[each.group.name] for each in ranked}
    return {each.group.name: each.least(numbers[each.group.name]) for each in ranked if numbers[each.group.name] > 0}
