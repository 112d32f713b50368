"""Single weights, or whole filters, set to zero where they lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Bench, ModulePass, Surgery

_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
"""Modules whose parameters of at least two axes are weights; norms, biases and bare parameters stay as they are."""


@dataclass(frozen=True, kw_only=True)
class MagnitudePruning(ModulePass):
    """Sets the least important weights to zero and keeps them there while the others are fine-tuned.

    w' = 0 where importance(w) < theta, with theta given as `threshold` or such that the share `sparsity` of the weights
    goes (Han et al. 2015; filters: Li et al. 2017). Shapes stay as they are: zeros save bytes where the graph is stored
    compressed (`engine.compressed=true`), and no time in kernels for dense matrices.

    Attributes:
        sparsity: share of the weights at zero, in [0, 1), as nearly as whole weights or filters allow.
        threshold: theta, > 0. Exactly one of both is given.
        importance: `weight`: its absolute value; `filter`: the L2 norm of the filter or row that it belongs to.
        scope: within which `sparsity` holds: of every `layer`, or `global`, over all layers that are pruned.
        keep: of the layers, in the order in which the model declares them, those that stay whole.
    """

    relieves: ClassVar[tuple[str, ...]] = ("capacity",)

    sparsity: Annotated[float, Interval(ge=0, lt=1)] | None = 0.5
    threshold: Annotated[float, Gt(0)] | None = None
    importance: Literal["weight", "filter"] = "weight"
    scope: Literal["layer", "global"] = "global"
    keep: tuple[Literal["first", "last"], ...] = ("last",)

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ConfigError(
                f"give pruning.sparsity or pruning.threshold and set the other one to null, "
                f"got sparsity={self.sparsity} and threshold={self.threshold}"
            )

    def __call__(self, model: nn.Module, bench: Bench) -> Surgery:
        """Prunes and fine-tunes a copy and re-estimates its batch normalization on the training rows.

        Raises:
            PassError: there is nothing to set to zero, or nothing of a layer would be left.
        """
        pruned = copy.deepcopy(model)
        weights = self._weights(pruned)
        dropped = {each.name: drop for each, drop in zip(weights, self._dropped(weights), strict=True)}
        shares = {name: float(drop.float().mean()) for name, drop in dropped.items()}
        self._check(shares)
        fitted = bench.fit(_Masked(pruned, dropped))
        assert isinstance(fitted, _Masked)
        fitted.set_to_zero()  # the optimizer's last step came after the last forward
        estimate_statistics(fitted.model, bench.train.inputs)
        step = {"technique": "magnitude pruning", "sparsity": shares, "resized": {}}
        return Surgery(model=fitted.model, steps=(step,))

    def _weights(self, model: nn.Module) -> list[_Weight]:
        weights = list(_weights(model))
        ends = {"first": weights[:1], "last": weights[-1:]}
        whole = {each.layer for end in self.keep for each in ends[end]}
        if all(each.layer in whole for each in weights):
            raise PassError(
                f"{type(model).__name__} has no layer to prune: of its convolutions, linear layers and the like, "
                f"{len(whole)} in number, pruning.keep={list(self.keep)} leaves none"
            )
        return [each for each in weights if each.layer not in whole]

    def _dropped(self, weights: Sequence[_Weight]) -> list[Tensor]:
        """True for what is to be zero, of the shapes of the weights."""
        scores = [self._scores(each) for each in weights]
        sizes = [each.tensor.numel() // len(score) for each, score in zip(weights, scores, strict=True)]
        if self.threshold is not None:
            chosen = [score < self.threshold for score in scores]
        elif self.scope == "layer":
            chosen = [self._least([score], [size])[0] for score, size in zip(scores, sizes, strict=True)]
        else:
            chosen = self._least(scores, sizes)
        if self.importance == "filter":
            chosen = [choice[each.filters] for choice, each in zip(chosen, weights, strict=True)]
            return [choice.expand_as(each.tensor).contiguous() for choice, each in zip(chosen, weights, strict=True)]
        return [choice.view_as(each.tensor) for choice, each in zip(chosen, weights, strict=True)]

    def _scores(self, weight: _Weight) -> Tensor:
        """Importance of each weight, or of each filter."""
        values = weight.tensor.detach()
        if self.importance == "weight":
            return values.abs().flatten()
        filters = weight.filters.expand_as(values).flatten()
        squares = torch.zeros(int(filters.max()) + 1, dtype=torch.float64)
        return squares.index_add_(0, filters, values.double().square().flatten()).sqrt()

    def _least(self, scores: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """True for the least important ones that together hold no more than the wanted share of the weights.

        Args:
            sizes: how many weights one score stands for.
        """
        assert self.sparsity is not None
        lengths = [len(score) for score in scores]
        order = torch.argsort(torch.cat(list(scores)), stable=True)
        held = torch.cumsum(torch.tensor(sizes).repeat_interleave(torch.tensor(lengths))[order], 0)
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[held <= round(self.sparsity * int(held[-1]))]] = True
        return list(torch.split(chosen, lengths))

    def _check(self, shares: Mapping[str, float]) -> None:
        knob, value = ("sparsity", self.sparsity) if self.threshold is None else ("threshold", self.threshold)
        empty = [name for name, share in shares.items() if share == 1]
        if empty:
            raise PassError(f"nothing of {', '.join(empty)} would be left: lower pruning.{knob} (now {value:g})")
        if not any(shares.values()):
            raise PassError(f"no weight would be set to zero: raise pruning.{knob} (now {value:g})")


@dataclass(frozen=True, kw_only=True)
class _Weight:
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


class _Masked(nn.Module):
    """A model whose dropped weights are set to zero again before every forward, whatever the optimizer made of them.

    The masks are buffers: a copy has its own, and a training is told from one with other masks.
    """

    def __init__(self, model: nn.Module, dropped: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(dropped)
        for place, drop in enumerate(dropped.values()):
            self.register_buffer(f"dropped{place}", drop)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        self.set_to_zero()
        return self.model(*inputs, **named)

    def set_to_zero(self) -> None:
        for place, name in enumerate(self._names):
            # Not a product with a mask, which would leave negative zeros.
            self.model.get_parameter(name).data.masked_fill_(self.get_buffer(f"dropped{place}"), 0.0)


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """The weights of the model's layers in the order of their declaration; one that several layers share once."""
    seen: set[int] = set()
    for layer, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, _LAYERS) else ():
            if parameter.ndim > 1 and not name.startswith("bias") and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Weight(
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
