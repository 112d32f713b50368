"""Removal of whole channels, attention heads and hidden units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from hasten.artefacts.module import resized
from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import ConfigError, PassError
from hasten.core.interfaces import Bench, ModulePass, Surgery
from hasten.passes.pruning.allocation import cheapest, uniform
from hasten.passes.pruning.costs import Costs, costs
from hasten.passes.pruning.groups import Allocation, Ranked, removal
from hasten.passes.pruning.importance import Importance, rank
from hasten.passes.pruning.latency_table import Meeting, Timer, meet
from hasten.passes.pruning.surgery import check_outputs, cut_channels, structure, without

Share = Annotated[float, Interval(ge=0, lt=1)]
_AMOUNTS = ("sparsity", "flops_cut", "parameters_cut", "latency_cut")


@dataclass(frozen=True, kw_only=True)
class StructuredPruning(ModulePass):
    """Removes the least important units of every layer but the output layer, then fine-tunes.

    Units are channels of convolutions and linear layers, attention heads, and hidden units of recurrent layers. Layers
    that share channels, such as those that a residual addition joins, lose the same ones: the dependency graph of Fang
    et al. 2023 (DepGraph).

    How much goes is told by one of `sparsity`, `flops_cut`, `parameters_cut` and `latency_cut`; the others are None. A
    cut spreads over the layers as it loses the least importance (`Ranked.loss`) for what it saves.

    Attributes:
        sparsity: share of the units removed, in [0, 1), as nearly as `round_to` allows.
        scope: within which `sparsity` holds: of every `layer`, or `global`, over all of them.
        flops_cut: share removed of the floating-point operations of a row, in [0, 1), or a little more.
        parameters_cut: share removed of the parameters, in [0, 1), or a little more.
        latency_cut: share removed of the latency on the target, measured in the recipe's engine, in [0, 1).
        importance: of a unit, over all weights that go with it; see `importance.rank`.
        round_to: keep a multiple of this many channels or hidden units, at least one; a layer that has no more stays as
            it is. Heads are kept by the piece.
        heads: whether attention heads are removed.
        rounds: in how many rounds of removal and fine-tuning; each keeps the same share of what the last one left.
    """

    relieves: ClassVar[tuple[str, ...]] = ("compute", "memory", "capacity")

    sparsity: Share | None = 0.5
    scope: Literal["layer", "global"] = "layer"
    flops_cut: Share | None = None
    parameters_cut: Share | None = None
    latency_cut: Share | None = None
    importance: Importance = "l2"
    round_to: Annotated[int, Ge(1)] = 4
    heads: bool = True
    rounds: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _AMOUNTS}
        if sum(value is not None for value in given.values()) != 1:
            told = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None) or "none of them"
            raise ConfigError(
                f"give one of {', '.join(f'pruning.{name}' for name in _AMOUNTS)} and set the others to null, "
                f"got {told}"
            )

    @property
    def measures(self) -> bool:
        return self.latency_cut is not None

    def __call__(self, model: nn.Module, bench: Bench) -> Surgery:
        """Prunes and fine-tunes a copy and re-estimates its batch normalization on the training rows.

        Raises:
            PassError: there is nothing to remove, the model does not run without what was removed, or what is asked for
                can't be reached.
        """
        example = {name: torch.from_numpy(values[:2]) for name, values in bench.train.inputs.items()}
        work = _Work(knobs=self, whole=model, example=example, bench=bench)
        pruned = model
        steps: list[Mapping[str, Any]] = []
        notes: list[str] = []
        for number in range(1, self.rounds + 1):
            cut = work.round(pruned, number)
            notes += cut.notes
            if cut.step is not None:
                steps.append(cut.step)
                pruned = bench.fit(cut.model)
                estimate_statistics(pruned, bench.train.inputs)
        if not steps:
            raise PassError(f"no layer has channels to remove: {self._why(work.widths)}")
        return Surgery(model=pruned, steps=tuple(steps), notes=tuple(dict.fromkeys(notes)))

    def _why(self, widths: Sequence[int]) -> str:
        if not widths:
            return "all its convolutions and linear layers feed the output or share channels with what must stay whole"
        (amount,) = (name for name in _AMOUNTS if getattr(self, name) is not None)
        return (
            f"with pruning.{amount}={getattr(self, amount):g} and pruning.round_to={self.round_to}, "
            f"layers of {list(widths)} channels stay as they are"
        )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What one round removed; without a step where rounding left nothing to remove."""

    model: nn.Module
    step: Mapping[str, Any] | None
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class _Work:
    """One application of the technique, round by round.

    Attributes:
        whole: the model before the first round.
        units: group -> units that it had before the first round.
        budget: what the whole model costs, by the measure that the cut is of.
    """

    knobs: StructuredPruning
    whole: nn.Module
    example: Mapping[str, Tensor]
    bench: Bench
    units: Mapping[str, int] | None = None
    budget: float | None = None

    @property
    def widths(self) -> list[int]:
        """Numbers of units that groups had before the first round."""
        return sorted({*(self.units or {}).values()})

    def round(self, model: nn.Module, number: int) -> _Cut:
        knobs = self.knobs
        found = structure(model, self.example, round_to=knobs.round_to, heads=knobs.heads)
        ranked = rank(model, found.groups, knobs.importance, self.bench)
        self.units = self.units or {each.group.name: each.group.num_units for each in ranked}
        judged = {each.group.name for each in ranked}
        notes = [*found.notes]
        if left := [group.name for group in found.groups if group.name not in judged]:
            notes.append(f"{', '.join(left)} stay whole: they have no batch normalization to judge them by.")
        kept, table = self._kept(model, ranked, number / knobs.rounds)
        removed = removal(ranked, kept)
        if not removed:
            return _Cut(model=model, step=None, notes=tuple(notes))
        pruned = without(model, self.example, found.groups, removed)
        check_outputs(model, pruned, self.example)
        step: dict[str, Any] = {
            "technique": "structured pruning",
            "removed": cut_channels(found.groups, removed),
            "resized": resized(model, pruned),
        }
        if table is not None:
            step["latency_table"] = {"whole_ms": self.budget, **_as_data(table)}
            notes.append(self._told(table))
        return _Cut(model=pruned, step=step, notes=tuple(notes))

    def _kept(self, model: nn.Module, ranked: Sequence[Ranked], progress: float) -> tuple[Allocation, Meeting | None]:
        """Widths of the groups after the share `progress` of all rounds, and how a latency was met."""
        knobs = self.knobs
        if knobs.sparsity is not None and knobs.scope == "layer":
            return uniform(ranked, (1 - knobs.sparsity) ** progress, self.units), None
        if not ranked:
            return {}, None
        if knobs.latency_cut is not None:
            meeting = self._meet(model, ranked, (1 - knobs.latency_cut) ** progress)
            return meeting.kept, meeting
        measure, cut, cost = self._measure(model, ranked)
        full = {each.group.name: each.group.num_units for each in ranked}
        self.budget = self.budget or cost(full)
        kept = cheapest(ranked, cost, self.budget * (1 - cut) ** progress)
        if kept is None:
            least = cost({each.group.name: each.group.widths[0] for each in ranked}) / self.budget
            raise PassError(
                f"pruning.{measure}={cut:g} can't be reached: the narrowest widths cut {1 - least:.3g}; lower it, or "
                f"pruning.round_to"
            )
        return kept, None

    def _measure(self, model: nn.Module, ranked: Sequence[Ranked]) -> tuple[str, float, Callable[[Allocation], float]]:
        """The knob that is set, its value, and what it is a share of."""
        knobs = self.knobs
        if knobs.sparsity is not None:
            return "sparsity", knobs.sparsity, lambda kept: float(sum(kept.values()))
        counted = self._costs(model, ranked)
        if knobs.flops_cut is not None:
            return "flops_cut", knobs.flops_cut, counted.flops
        assert knobs.parameters_cut is not None
        return "parameters_cut", knobs.parameters_cut, counted.parameters

    def _costs(self, model: nn.Module, ranked: Sequence[Ranked]) -> Costs:
        return costs(model, [each.group for each in ranked], self.example)

    def _meet(self, model: nn.Module, ranked: Sequence[Ranked], share: float) -> Meeting:
        if self.budget is None:
            (self.budget,) = self.bench.latencies_ms([self.whole])
        meeting = meet(ranked, self.budget * share, self._timer(model, ranked), self._costs(model, ranked).shape)
        if meeting.measured_ms >= self.budget:
            raise PassError(
                f"pruning.latency_cut={self.knobs.latency_cut:g} makes the model no faster: {meeting.measured_ms:.3g} "
                f"ms instead of {self.budget:.3g} ms on the target"
            )
        return meeting

    def _timer(self, model: nn.Module, ranked: Sequence[Ranked]) -> Timer:
        groups = [each.group for each in ranked]

        def timer(allocations: Sequence[Allocation]) -> list[float]:
            pruned = [without(model, self.example, groups, removal(ranked, kept)) for kept in allocations]
            # The whole model takes part every time, so that sessions on a busy and a quiet machine can be compared.
            whole_ms, *latencies = self.bench.latencies_ms([self.whole, *pruned])
            assert self.budget is not None
            return [latency * self.budget / whole_ms for latency in latencies]

        return timer

    def _told(self, met: Meeting) -> str:
        assert self.budget is not None
        curve = ", ".join(f"{share:.3g} of the units {latency:.3g} ms" for share, latency in met.curve.items())
        return (
            f"Pruned to a latency: predicted {met.predicted_ms:.3g} ms from the latency table, measured "
            f"{met.measured_ms:.3g} ms, asked for {met.target_ms:.3g} ms of {self.budget:.3g} ms"
            f"; with the same share kept in all layers: {curve}."
        )


def _as_data(met: Meeting) -> dict[str, Any]:
    return {
        "target_ms": met.target_ms,
        "predicted_ms": met.predicted_ms,
        "measured_ms": met.measured_ms,
        "uniform_ms": {f"{share:g}": latency for share, latency in met.curve.items()},
        "tables": [table.to_dict() for table in met.tables],
    }
