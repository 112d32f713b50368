"""8 bits where they pay: layer by layer, by the time that they save and the error that they make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from hasten.core.errors import PassError
from hasten.core.interfaces import Bench, Columns, Graph, TrainedGraphPass
from hasten.core.processor import has_vnni
from hasten.passes.quantization.placement import Placement, relative_error
from hasten.passes.quantization.ranges import Method
from hasten.passes.quantization.static import StaticQuantization, placer, spread

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from hasten.passes.quantization.layers import Layer

_TIMED_ROWS = 32
"""That the ranges of timed graphs are measured on: they don't decide how long a graph takes."""
_SIMULATED_ROWS = 128
_BEST = "best.onnx"
_NAMED = 8
"""Layers that a note names, at most."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(TrainedGraphPass):
    """Static quantization of the layers that gain by it, as many as a bound on the error of the outputs allows.

    A layer's sensitivity is the error of the network's outputs when it alone is quantized, simulated; its gain is the
    time that the quantized graph takes longer on the target when it stays float. Layers of one shape are timed
    together. Those without gain stay float; of the others, as many are quantized as keep the error of the engine's
    outputs within the bound, those with the most gain for their sensitivity first. Errors are root mean squares, as
    shares of the standard deviation of the float outputs.

    Attributes:
        max_error: the largest error of the outputs on the calibration rows.
        calibration_rows: that ranges and errors are measured on, at most.
        ranges: as of `StaticQuantization`, like the next three.
    """

    relieves = ("compute", "memory", "capacity")
    never_with = ("engine=hls",)

    max_error: Annotated[float, Gt(0)] = 0.1
    calibration_rows: Annotated[int, Ge(1)] = 256
    ranges: Method = "minmax"
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    per_channel: bool = True
    weights: Literal["auto", "s8", "s7", "u8"] = "auto"

    @property
    def measures(self) -> bool:
        return True

    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path, bench: Bench) -> tuple[str, ...]:
        from hasten.artefacts.capture import capture
        from hasten.artefacts.module import rebuild
        from hasten.passes.quantization.layers import OUTPUTS_FIRST, layers, operator

        rows = spread(calibration, self.calibration_rows, "mixed")
        captured = capture(rebuild(graph.module), graph.signature).module()
        every = layers(captured)
        found = {layer.path: layer for layer in every if operator(layer.node) in OUTPUTS_FIRST}
        gains = self._gains(graph, rows, family, captured, list(found.values()), bench)
        errors = self._sensitivities(captured, list(found.values()), rows)
        paying = [path for path in found if gains[path] > 0]
        ranked = sorted(paying, key=lambda path: gains[path] / max(errors[path], 1e-12), reverse=True)
        with TemporaryDirectory(prefix="hasten-") as scratch:
            names = [each.path for each in every]
            number, error, others = self._within_bound(graph, rows, family, ranked, names, Path(scratch))
            if not number:
                raise PassError(
                    f"quantization=mixed: no layer gains by 8 bits within max_error={self.max_error:g} "
                    f"({len(paying)} of {len(found)} gain at all; quantization.max_error)"
                )
            file = Path(scratch, _BEST)
            timed = _faster(graph, file, bench)
            file.replace(folder / "model.onnx")
        told = {path: f"{path} ({gains[path]:+.4f} ms, error {errors[path]:.2%})" for path in found}
        return (
            f"{number} of {len(every)} layers run in 8 bits, with an error of {error:.2%} of the outputs "
            f"(quantization.max_error={self.max_error:g}); {timed}",
            *_listed("8 bits gain nothing", [told[path] for path in found if path not in paying]),
            *_listed("the error would be too large", [told[path] for path in ranked[number:]]),
            *others,
        )

    def _static(self, keep: Sequence[str], **others: Any) -> StaticQuantization:
        method = StaticQuantization(
            calibration_rows=self.calibration_rows,
            ranges=self.ranges,
            percentile=self.percentile,
            per_channel=self.per_channel,
            weights=self.weights,
            keep=tuple(keep),
        )
        return replace(method, **others)

    def _gains(
        self, graph: Graph, rows: Columns, family: str, captured: GraphModule, found: Sequence[Layer], bench: Bench
    ) -> dict[str, float]:
        """Milliseconds of a request that each layer saves in 8 bits."""
        groups = _by_shape(captured, found)
        # All types of weights that run in integers take the same time, but for those of u8.
        weights = self.weights if self.weights != "auto" else "s8" if has_vnni() else "s7"
        quick: dict[str, Any] = {"weights": weights, "ranges": "minmax", "calibration_rows": _TIMED_ROWS}
        with TemporaryDirectory(prefix="hasten-") as scratch:
            graphs = []
            for number, kept in enumerate(([], *groups)):
                (place := Path(scratch, str(number))).mkdir()
                self._static(kept, **quick)(graph, rows, family, place)
                graphs.append(replace(graph, onnx=place / "model.onnx", quantized=True))
            integers, *without = bench.graph_latencies_ms(graphs)
        return {
            path: (latency - integers) / len(group)
            for latency, group in zip(without, groups, strict=True)
            for path in group
        }

    def _sensitivities(self, captured: GraphModule, found: Sequence[Layer], rows: Columns) -> dict[str, float]:
        """Error of the network's outputs when one layer alone is quantized, its weights and its inputs."""
        from hasten.passes.quantization.simulation import InputRanges, Simulation

        # The type of the weights may not be known yet; one bit does not change the order of the layers.
        placement = Placement(ranges=self.ranges, percentile=self.percentile, per_channel=self.per_channel)
        some = {name: values[:_SIMULATED_ROWS] for name, values in rows.items()}
        floats = InputRanges(captured, placement, found)
        reference = floats.outputs(some).numpy()
        return {
            layer.path: relative_error(
                Simulation(captured, placement, [layer], floats.ranges).outputs(some).numpy(), reference
            )
            for layer in found
        }

    def _within_bound(
        self,
        graph: Graph,
        rows: Columns,
        family: str,
        ranked: Sequence[str],
        every: Sequence[str],
        folder: Path,
    ) -> tuple[int, float, tuple[str, ...]]:
        """Writes the best graph, with as many of the first layers in 8 bits as the bound allows, by bisection.

        Returns:
            How many they are, the error of their outputs, and the notes of their placement.
        """
        engine = placer(family)
        reference = engine.outputs(graph.onnx, rows)
        best: tuple[int, float, tuple[str, ...]] = (0, 0.0, ())
        fits, fails, number = 0, len(ranked) + 1, len(ranked)
        while fits < number < fails:
            keep = [path for path in every if path not in ranked[:number]]
            notes = self._static(keep)(graph, rows, family, folder)
            error = relative_error(engine.outputs(folder / "model.onnx", rows), reference)
            if error <= self.max_error:
                fits, best = number, (number, error, notes)
                (folder / "model.onnx").replace(folder / _BEST)
            else:
                fails = number
            number = (fits + fails) // 2
        return best


def _faster(graph: Graph, file: Path, bench: Bench) -> str:
    """What the chosen graph gains as a whole.

    Raises:
        PassError: it is no faster: each layer pays where the others are in 8 bits, and getting there may cost more than
            all of them save.
    """
    chosen, floats = bench.graph_latencies_ms([replace(graph, onnx=file, quantized=True), graph])
    figures = f"a request takes {chosen:.4f} ms, in floats {floats:.4f} ms"
    if chosen >= floats:
        raise PassError(f"quantization=mixed: no choice of layers is faster in 8 bits: {figures}")
    return figures


def _by_shape(captured: GraphModule, found: Sequence[Layer]) -> list[list[str]]:
    """The paths of the layers that do the same work, together."""
    from hasten.passes.quantization.layers import operator, tensor

    groups: Mapping[str, list[str]] = defaultdict(list)
    for layer in found:
        node = layer.node
        read = node.all_input_nodes[0].meta["val"].shape[1:]
        groups[f"{operator(node)} {tensor(captured, layer.weight).shape} {read} {node.args[3:]}"].append(layer.path)
    return list(groups.values())


def _listed(why: str, told: Sequence[str]) -> tuple[str, ...]:
    """One note for the layers that stay float for one reason."""
    if not told:
        return ()
    more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return (f"float, as {why}: {', '.join(told[:_NAMED])}{more}",)
