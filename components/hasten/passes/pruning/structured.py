"""Removal of whole channels."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from hasten.artefacts.module import forward, resized
from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import PassError
from hasten.core.interfaces import Bench, ModulePass, Surgery

_WHOLE = (nn.MultiheadAttention, nn.LSTM, nn.Embedding)
"""Modules whose width can't be changed a channel at a time."""
_PRODUCTS = ("BmmBackward", "ScaledDotProduct")
"""Products of activations: the channels of an attention's queries, keys and values are divided into heads."""


@dataclass(frozen=True, kw_only=True)
class StructuredPruning(ModulePass):
    """Removes the least important channels of every layer but the output layer, then fine-tunes.

    Layers that share channels, such as those that a residual addition joins, lose the same ones: the dependency graph
    of Fang et al. 2023 (DepGraph). A channel's importance is the sum of the absolute values (`l1`) or squares (`l2`) of
    the weights that belong to it, averaged over all layers that it runs through.

    Attributes:
        sparsity: share of the channels removed from each layer, in [0, 1), as nearly as `round_to` allows.
        importance: `l1` or `l2`.
        round_to: keep a multiple of this many channels, at least one; a layer that has no more stays as it is.
    """

    relieves: ClassVar[tuple[str, ...]] = ("compute", "memory", "capacity")

    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    importance: Literal["l1", "l2"] = "l2"
    round_to: Annotated[int, Ge(1)] = 4

    def __call__(self, model: nn.Module, bench: Bench) -> Surgery:
        """Prunes and fine-tunes a copy and re-estimates its batch normalization on the training rows.

        Raises:
            PassError: there is nothing to remove, or the model does not run without what was removed.
        """
        pruned = copy.deepcopy(model)
        example = {name: torch.from_numpy(values[:2]) for name, values in bench.train.inputs.items()}
        removed = self._remove_channels(pruned, example)
        step = {"technique": "structured pruning", "removed": removed, "resized": resized(model, pruned)}
        _check_outputs(model, pruned, example)
        fitted = bench.fit(pruned)
        estimate_statistics(fitted, bench.train.inputs)
        return Surgery(model=fitted, steps=(step,))

    def _remove_channels(self, model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Cuts channels out of the model itself; gives layer -> channels, of the layer that stands for its group."""
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        names = {module: name for name, module in model.named_modules()}
        try:
            with _quiet(), torch.enable_grad():
                choices = self._cut(model.requires_grad_(True), example)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise PassError(
                f"the channels of {type(model).__name__} can't be followed by torch-pruning: {reason}"
            ) from error
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return {names[module]: channels for module, channels in choices.items()}

    def _cut(self, model: nn.Module, example: Mapping[str, Tensor]) -> dict[nn.Module, list[int]]:
        from torch_pruning import DependencyGraph
        from torch_pruning.pruner.importance import GroupMagnitudeImportance

        score = GroupMagnitudeImportance(p={"l1": 1, "l2": 2}[self.importance])
        # As `forward` calls it: one input by its place, several by their names.
        inputs = tuple(example.values()) if len(example) == 1 else dict(example)
        graph = DependencyGraph().build_dependency(model, example_inputs=inputs)
        groups = [group for group in graph.get_all_groups() if _is_prunable(graph, group)]
        # All choices first: cutting one group changes the weights by which the next would be judged.
        choices = [(group[0].dep, self._least_important(score(group), _num_blocks(group))) for group in groups]
        choices = [(root, channels) for root, channels in choices if channels]
        if not choices:
            widths = sorted({group[0].dep.target.module.weight.shape[0] for group in groups})
            raise PassError(f"no layer has channels to remove: {self._why(widths)}")
        for root, channels in choices:
            graph.get_pruning_group(root.target.module, root.handler, channels).prune()
        return {root.target.module: channels for root, channels in choices}

    def _least_important(self, scores: Tensor | None, num_blocks: int) -> list[int]:
        """Channels to remove, the same places in each of the blocks that a grouped layer divides its channels into."""
        if scores is None:
            return []
        by_place = scores.detach().view(num_blocks, -1).mean(0)
        size = len(by_place)
        multiple = self.round_to // math.gcd(self.round_to, num_blocks)
        keep = max(multiple, round(size * (1 - self.sparsity) / multiple) * multiple)
        places = torch.argsort(by_place, stable=True)[: max(0, size - keep)]
        return sorted(block * size + int(place) for block in range(num_blocks) for place in places)

    def _why(self, widths: list[int]) -> str:
        if not widths:
            return "all its convolutions and linear layers feed the output or share channels with what must stay whole"
        return (
            f"with pruning.sparsity={self.sparsity:g} and pruning.round_to={self.round_to}, "
            f"layers of {widths} channels stay as they are"
        )


def _is_prunable(graph: Any, group: Any) -> bool:
    """Whether the group's channels are no outputs of the model, and run through nothing that has to stay whole."""
    from torch_pruning.ops import _ConcatOp

    for dep, _ in group:
        node = dep.target
        if isinstance(node.module, _WHOLE) or any(name in str(node.name) for name in _PRODUCTS):
            return False
        if not node.outputs and graph.is_out_channel_pruning_fn(dep.handler):
            return False
        # torch-pruning 1.6 mixes up the parts of a concatenation whose pixels are flattened, or that a bare parameter
        # of three dimensions leads to, which it takes for the position embedding of a transformer.
        if isinstance(node.module, _ConcatOp) and (node.module.offsets is None or not node.enable_index_mapping):
            return False
    return True


def _num_blocks(group: Any) -> int:
    """Into how many blocks of equal size the group's channels are divided by grouped convolutions and norms."""
    blocks = [1]
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.GroupNorm):
            blocks.append(module.num_groups)
        elif isinstance(module, nn.modules.conv._ConvNd) and module.groups != module.out_channels:
            blocks.append(module.groups)
    return math.lcm(*blocks)


def _check_outputs(model: nn.Module, pruned: nn.Module, example: Mapping[str, Tensor]) -> None:
    try:
        with torch.no_grad():
            given, wanted = (forward(side.eval(), example).shape for side in (pruned, copy.deepcopy(model)))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise PassError(f"{type(model).__name__} does not run with fewer channels: {reason}") from error
    if given != wanted:
        raise PassError(f"{type(model).__name__} gives {tuple(given)} with fewer channels instead of {tuple(wanted)}")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*Unwrapped parameters detected.*")
        warnings.filterwarnings("ignore", message=r".*Unknown operation .* encountered.*")
        yield
