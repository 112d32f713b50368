"""Single weights, or whole filters, set to zero where they lie."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Bench, ModulePass, Surgery
from hasten.passes.pruning.masks import End, Masked, Weight, prunable, zeros_note
from hasten.passes.pruning.weight_importance import importances


@dataclass(frozen=True, kw_only=True)
class UnstructuredPruning(ModulePass):
    """Sets the least important weights to zero and keeps them there while the others are fine-tuned.

    w' = 0 where importance(w) < theta, and w' = w elsewhere, with theta given as `threshold` or such that the share
    `sparsity` of the weights goes: the importance of the first weight that stays, equal ones in the order in which they
    lie (Han et al. 2015; filters: Li et al. 2017). Shapes stay as they are: zeros save bytes where the graph is stored
    compressed (`engine.compressed=true`), and no time in kernels for dense matrices.

    In several rounds, each of them fine-tuned for all of `training.epochs`, the share grows by the cubic schedule of
    Zhu and Gupta 2017: s_t = sparsity (1 - (1 - t / rounds)^3) after round t. Importances are told anew in every round,
    and what went never comes back.

    Attributes:
        sparsity: share of the weights at zero, in [0, 1), as nearly as whole weights or filters allow.
        threshold: theta, > 0. Exactly one of both is given.
        importance: `magnitude`, `taylor` or `random`, as of `passes.pruning.weight_importance`; `filter`: the L2 norm
            of the filter or row that the weight belongs to.
        scope: within which `sparsity` holds: of every `layer`, or `global`, over all layers that are pruned.
        rounds: of pruning and fine-tuning, at least 1; with `threshold` just 1, since a theta has no schedule.
        keep: of the layers, in the order in which the model declares them, those that stay whole.
    """

    relieves: ClassVar[tuple[str, ...]] = ("capacity",)

    sparsity: Annotated[float, Interval(ge=0, lt=1)] | None = 0.5
    threshold: Annotated[float, Gt(0)] | None = None
    importance: Literal["magnitude", "filter", "taylor", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "global"
    rounds: Annotated[int, Ge(1)] = 1
    keep: tuple[End, ...] = ("last",)

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ConfigError(
                f"give pruning.sparsity or pruning.threshold and set the other one to null, "
                f"got sparsity={self.sparsity} and threshold={self.threshold}"
            )
        if self.threshold is not None and self.rounds > 1:
            raise ConfigError(
                f"pruning.rounds={self.rounds} needs pruning.sparsity, which grows from round to round: "
                f"set pruning.rounds=1 to prune by pruning.threshold={self.threshold:g}"
            )

    def __call__(self, model: nn.Module, bench: Bench) -> Surgery:
        """Prunes and fine-tunes a copy and re-estimates its batch normalization on the training rows.

        Raises:
            PassError: there is nothing to set to zero, or nothing of a layer would be left.
        """
        pruned = copy.deepcopy(model)
        dropped = {each.name: torch.zeros_like(each.tensor, dtype=torch.bool) for each in self._weights(pruned)}
        reached = []
        for number in range(1, self.rounds + 1):
            scores, sizes = self._scores(pruned, dropped, bench)
            chosen = self._chosen(scores, sizes, self._scheduled(number))
            dropped = self._masks(self._weights(pruned), chosen)
            self._check(dropped)
            fitted = bench.fit(Masked(pruned, dropped))
            assert isinstance(fitted, Masked)
            fitted.set_to_zero()  # the optimizer's last step came after the last forward
            pruned = fitted.model
            reached.append(_share(dropped))
        estimate_statistics(pruned, bench.train.inputs)
        step = {
            "technique": "unstructured pruning",
            "sparsity": {name: float(drop.float().mean()) for name, drop in dropped.items()},
            "thresholds": dict(zip(dropped, _thresholds(scores, chosen, self._per_layer), strict=True)),
            "resized": {},
        }
        return Surgery(model=pruned, steps=(step,), notes=(*self._rounds_note(reached), zeros_note(pruned)))

    @property
    def _per_layer(self) -> bool:
        return self.scope == "layer" and self.threshold is None

    def _weights(self, model: nn.Module) -> list[Weight]:
        return prunable(model, self.keep)

    def _scheduled(self, number: int) -> float | None:
        """Share that is zero after a round, counted from 1; None where a threshold decides."""
        if self.sparsity is None:
            return None
        return self.sparsity * (1 - (1 - number / self.rounds) ** 3)

    def _scores(self, model: nn.Module, dropped: Mapping[str, Tensor], bench: Bench) -> tuple[list[Tensor], list[int]]:
        """Importance of each weight, or of each filter, flat for every weight tensor; of what went, less than any.

        Returns:
            The importances, and how many weights one of them stands for.
        """
        weights = self._weights(model)
        if self.importance == "filter":
            scores = [_filter_norms(each) for each in weights]
            gone = [_of_filters(dropped[each.name], each) for each in weights]
        else:
            scores = [score.flatten() for score in importances(weights, self.importance, model, bench)]
            gone = [dropped[each.name].flatten() for each in weights]
        sizes = [each.tensor.numel() // len(score) for each, score in zip(weights, scores, strict=True)]
        return [score.masked_fill(went, -torch.inf) for score, went in zip(scores, gone, strict=True)], sizes

    def _chosen(self, scores: Sequence[Tensor], sizes: Sequence[int], sparsity: float | None) -> list[Tensor]:
        """True for what is to be zero, in the order of the scores."""
        if sparsity is None:
            assert self.threshold is not None
            return [score < self.threshold for score in scores]
        if self._per_layer:
            return [_least([score], [size], sparsity)[0] for score, size in zip(scores, sizes, strict=True)]
        return _least(scores, sizes, sparsity)

    def _masks(self, weights: Sequence[Weight], chosen: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name of a weight tensor -> True for what is to be zero, of its shape."""
        if self.importance == "filter":
            chosen = [choice[each.filters].expand_as(each.tensor) for choice, each in zip(chosen, weights, strict=True)]
        return {
            each.name: choice.reshape(each.tensor.shape).contiguous()
            for choice, each in zip(chosen, weights, strict=True)
        }

    def _check(self, dropped: Mapping[str, Tensor]) -> None:
        knob, value = ("sparsity", self.sparsity) if self.threshold is None else ("threshold", self.threshold)
        empty = [name for name, drop in dropped.items() if drop.all()]
        if empty:
            raise PassError(f"nothing of {', '.join(empty)} would be left: lower pruning.{knob} (now {value:g})")
        if not any(drop.any() for drop in dropped.values()):
            sooner = f" or lower pruning.rounds (now {self.rounds})" if self.rounds > 1 else ""
            raise PassError(f"no weight would be set to zero: raise pruning.{knob} (now {value:g}){sooner}")

    def _rounds_note(self, reached: Sequence[float]) -> tuple[str, ...]:
        if self.rounds == 1:
            return ()
        shares = ", ".join(f"{100 * share:.0f}" for share in reached)
        return (f"pruned and fine-tuned in {self.rounds} rounds, to {shares} % of the weights of the layers pruned",)


def _least(scores: Sequence[Tensor], sizes: Sequence[int], sparsity: float) -> list[Tensor]:
    """True for the least important ones that together hold no more than the wanted share of the weights.

    Args:
        sizes: how many weights one score stands for.
    """
    lengths = [len(score) for score in scores]
    order = torch.argsort(torch.cat(list(scores)), stable=True)
    held = torch.cumsum(torch.tensor(sizes).repeat_interleave(torch.tensor(lengths))[order], 0)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[held <= round(sparsity * int(held[-1]))]] = True
    return list(torch.split(chosen, lengths))


def _thresholds(scores: Sequence[Tensor], chosen: Sequence[Tensor], per_layer: bool) -> list[float]:
    """Theta of each weight tensor: the least importance that stays, of its own weights or of all."""
    least = [float(score[~choice].min()) for score, choice in zip(scores, chosen, strict=True)]
    return least if per_layer else [min(least)] * len(least)


def _filter_norms(weight: Weight) -> Tensor:
    """L2 norm of each filter."""
    values = weight.tensor.detach()
    filters = weight.filters.expand_as(values).flatten()
    squares = torch.zeros(int(filters.max()) + 1, dtype=torch.float64)
    return squares.index_add_(0, filters, values.double().square().flatten()).sqrt()


def _of_filters(drop: Tensor, weight: Weight) -> Tensor:
    """Which filters a mask of whole filters drops."""
    filters = weight.filters.expand_as(drop).flatten()
    gone = torch.zeros(int(filters.max()) + 1, dtype=torch.bool)
    gone[filters[drop.flatten()]] = True
    return gone


def _share(dropped: Mapping[str, Tensor]) -> float:
    return sum(int(drop.sum()) for drop in dropped.values()) / sum(drop.numel() for drop in dropped.values())
