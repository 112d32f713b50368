"""N of every M weights: a regular pattern of zeros that kernels can skip."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Bench, ModulePass, Surgery, Target
from hasten.passes.pruning.masks import End, Masked, Weight, prunable, zeros_note
from hasten.passes.pruning.semi_structured import KERNELS
from hasten.passes.pruning.weight_importance import Importance, importances


@dataclass(frozen=True, kw_only=True)
class NMSparsity(ModulePass):
    """Leaves the n most important of every m consecutive weights and keeps the others at zero while it fine-tunes.

    Groups lie along the input axis of linear layers and convolutions (Mishra et al. 2021): m inputs of one output, at
    one place of the kernel. That is the inner axis of the matrix product that a convolution in channels-last layout is,
    which is where semi-structured kernels skip zeros. Layers whose number of inputs (in a group of channels) is no
    multiple of m stay whole, and so do transposed convolutions, attention's joint projection and recurrent layers.

    Only GPUs have such kernels, for 2 of 4; `passes.pruning.semi_structured` converts linear layers for them.

    Attributes:
        n: weights that stay of each group, at least 1 and less than m.
        m: weights of a group.
        importance: `magnitude`, `taylor` or `random`, as of `passes.pruning.weight_importance`.
        keep: of the layers, in the order in which the model declares them, those that stay whole.
        without_kernels: prunes also for a target without such kernels, where nothing gets faster; for a model that is
            to be deployed elsewhere.
    """

    relieves: ClassVar[tuple[str, ...]] = ("compute",)

    n: Annotated[int, Ge(1)] = 2
    m: Annotated[int, Ge(2)] = 4
    importance: Importance = "magnitude"
    keep: tuple[End, ...] = ("last",)
    without_kernels: bool = False

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise ConfigError(f"pruning.n must be less than pruning.m={self.m}, got {self.n} (pruning.n)")

    def supports(self, target: Target) -> str | None:
        if self.without_kernels:
            return None
        return (
            f"only {KERNELS} skip zeros in that pattern, and target.device={target.device} has none; use "
            "pruning=unstructured for bytes or pruning=structured for time, or set pruning.without_kernels=true to "
            "prune here what is to run there"
        )

    def __call__(self, model: nn.Module, bench: Bench) -> Surgery:
        """Prunes and fine-tunes a copy and re-estimates its batch normalization on the training rows.

        Raises:
            PassError: no layer can take the pattern.
        """
        pruned = copy.deepcopy(model)
        weights = self._weights(pruned)
        scores = importances(weights, self.importance, pruned, bench)
        dropped = {each.name: self._dropped(score) for each, score in zip(weights, scores, strict=True)}
        fitted = bench.fit(Masked(pruned, dropped))
        assert isinstance(fitted, Masked)
        fitted.set_to_zero()  # the optimizer's last step came after the last forward
        estimate_statistics(fitted.model, bench.train.inputs)
        step = {"technique": "N:M sparsity", "n": self.n, "m": self.m, "layers": list(dropped), "resized": {}}
        pattern = (
            f"layers with {self.n} of every {self.m} weights left: {len(dropped)}; only {KERNELS} gain time from that, "
            "nothing on a CPU does"
        )
        return Surgery(model=fitted.model, steps=(step,), notes=(pattern, zeros_note(fitted.model)))

    def _weights(self, model: nn.Module) -> list[Weight]:
        layers = [each for each in prunable(model, self.keep) if _has_input_axis(model.get_submodule(each.layer))]
        fitting = [each for each in layers if each.tensor.shape[1] % self.m == 0]
        if not fitting:
            sizes = sorted({each.tensor.shape[1] for each in layers})
            raise PassError(
                f"no linear layer or convolution of {type(model).__name__} that may be pruned has a multiple of "
                f"pruning.m={self.m} inputs: there are {', '.join(map(str, sizes)) or 'none'}"
            )
        return fitting

    def _dropped(self, score: Tensor) -> Tensor:
        """True for the least important weights of each group, of equal ones for the first; (outputs, inputs, ...)."""
        inputs_last = score.movedim(1, -1)
        groups = inputs_last.reshape(*inputs_last.shape[:-1], -1, self.m)
        least = groups.argsort(dim=-1, stable=True)[..., : self.m - self.n]
        dropped = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, least, True)
        return dropped.flatten(-2).movedim(-1, 1).contiguous()


def _has_input_axis(layer: nn.Module) -> bool:
    """Whether the second axis of its weight is the inputs of one output."""
    return isinstance(layer, nn.Linear | _ConvNd) and not isinstance(layer, _ConvTransposeNd)
