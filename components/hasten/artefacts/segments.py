"""Divides an exported graph at its cheap cut points, so that several devices can share the work of one model.

A cut point is a tensor that alone separates what comes before it from what comes after it, apart from the graph's
inputs, which are at hand everywhere. What lies between two cut points is a segment; parallel branches with work of
their own become segments too. Every segment writes one tensor, so that any engine that runs a graph runs a segment.

What is calculated from the inputs or from constants alone without any real work (shapes, masks, positions, weights that
are turned back into floats) is repeated in every segment that reads it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hasten.artefacts.operators import kind
from hasten.core.interfaces import Graph, Input, Signature

_REFERENCE_ROWS = 8
_WORK = frozenset({"convolution", "linear", "normalization", "pooling", "quantize"})
"""Kinds of operators that are not done twice. What is neither of them costs less than handing its result over."""
_BRANCH_SHARE = 0.05
"""Of the arithmetic of the whole graph: what a parallel branch has to have at least to be worth a segment."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Part of a graph with one output.

    Attributes:
        writes: name of the tensor that it gives.
        reads: what it takes: names of inputs of the graph, and of tensors that other segments write.
        nodes: positions of its operators in the order in which they can be run, ascending.
        share: of the arithmetic of the whole graph, in [0, 1], by its shapes.
        row_bytes: of what it writes, for each row.
    """

    writes: str
    reads: tuple[str, ...]
    nodes: tuple[int, ...]
    share: float
    row_bytes: float


def decompose(graph: Graph, max_segments: int) -> Divided:
    """Divides a graph into at most so many segments of similar work, in an order in which they can be run."""
    divided = _Graph(onnx.load(graph.onnx), _rows(graph), _lengths(graph)).divided(max_segments)
    return Divided(graph=graph, segments=divided)


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A graph and its segments, the last of which writes the graph's output."""

    graph: Graph
    segments: tuple[Segment, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.graph.signature.names

    def consumers(self, segment: Segment) -> tuple[Segment, ...]:
        return tuple(each for each in self.segments if segment.writes in each.reads)

    def merged(self, groups: Sequence[int]) -> Divided:
        """Joins a segment with the only one that reads it where both are of one group.

        Args:
            groups: of each segment, for example the device that it runs on.
        """
        parts = list(zip(self.segments, groups, strict=True))
        while (pair := _joinable(parts)) is not None:
            first, second = pair
            (one, _), (other, group) = parts[first], parts[second]
            parts[second] = (_joined(one, other), group)
            del parts[first]
        return replace(self, segments=tuple(segment for segment, _ in parts))

    def write(self, folder: Path) -> list[Graph]:
        """Writes each segment as a graph of its own, with what goes in and comes out for some rows of the reference."""
        return _Graph(onnx.load(self.graph.onnx), _rows(self.graph), _lengths(self.graph)).written(
            self.graph, self.segments, folder
        )


def _joinable(parts: Sequence[tuple[Segment, int]]) -> tuple[int, int] | None:
    """Places of a segment and of its only reader, both of one group."""
    for place, (segment, group) in enumerate(parts):
        readers = [number for number, (other, _) in enumerate(parts) if segment.writes in other.reads]
        if len(readers) == 1 and parts[readers[0]][1] == group:
            return place, readers[0]
    return None


def _joined(one: Segment, other: Segment) -> Segment:
    """Both in one; `other` is the only reader of `one`."""
    reads = dict.fromkeys([*one.reads, *(name for name in other.reads if name != one.writes)])
    return Segment(
        writes=other.writes,
        reads=tuple(reads),
        nodes=tuple(sorted((*one.nodes, *other.nodes))),
        share=one.share + other.share,
        row_bytes=other.row_bytes,
    )


def _rows(graph: Graph) -> dict[str, NDArray[Any]]:
    reference = load_file(graph.reference)
    rows = {name: reference[f"inputs.{name}"] for name in graph.signature.names}
    count = min(_REFERENCE_ROWS, *(len(values) for values in rows.values()))
    order = np.arange(max(3, count)) % count  # two sizes of batch have to differ from one another and from 1
    return {name: values[order] for name, values in rows.items()}


def _lengths(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {each.name: each.dynamic for each in graph.signature.inputs}


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A tensor that alone leaves a set of nodes (bits of an integer) closed under what they read."""

    tensor: str
    before: int


class _Graph:
    """The graph with its shapes, as found by running it once for each thing that may change."""

    def __init__(
        self, model: onnx.ModelProto, rows: Mapping[str, NDArray[Any]], lengths: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.model = model
        self.rows = rows
        self.lengths = lengths
        self.nodes = _in_order(model.graph.node)
        self.inputs = tuple(each.name for each in model.graph.input)
        self.output = model.graph.output[0].name
        self.constants = {each.name for each in model.graph.initializer}
        self.producer = {name: place for place, node in enumerate(self.nodes) for name in node.output if name}
        self.reads = [tuple(dict.fromkeys(_reads(node))) for node in self.nodes]

    def divided(self, max_segments: int) -> tuple[Segment, ...]:
        everything = self._mask(place for place in range(len(self.nodes)) if place not in self.repeated)
        cuts = self._cheap(self._cuts(everything, self.output), max_segments)
        segments: list[Segment] = []
        for cut in cuts:
            inside = 0
            for other in cuts:
                if other is not cut and other.before & ~cut.before == 0:
                    inside |= other.before
            segments += self._with_branches(cut.before & ~inside, cut.tensor)
        return self._few(sorted(segments, key=lambda each: self.producer[each.writes]), max_segments)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that a node writes, for all rows."""
        return {name: shape for name, (shape, _) in self._forms.items()}

    @cached_property
    def _forms(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape of every tensor that a node writes, for all rows, and bytes of its elements."""
        return {name: (it.shape, it.itemsize) for name, it in self._run(self.rows, self.producer).items()}

    @cached_property
    def repeated(self) -> frozenset[int]:
        """Nodes that are done in every segment that reads them: from inputs and constants, without any real work."""
        found: set[int] = set()
        from_constants = set(self.constants)
        for place, (node, reads) in enumerate(zip(self.nodes, self.reads, strict=True)):
            only_constants = from_constants.issuperset(reads)
            if only_constants:
                from_constants.update(node.output)
            sources = [self.producer[name] for name in reads if name in self.producer]
            cheap = kind(node.op_type) not in _WORK and self.output not in node.output
            if only_constants or (cheap and found.issuperset(sources)):
                found.add(place)
        return frozenset(found)

    @cached_property
    def _cost(self) -> list[float]:
        """Multiply-adds or elements of each node."""
        weights = {each.name: tuple(each.dims) for each in self.model.graph.initializer}
        shapes = {**weights, **{name: values.shape for name, values in self.rows.items()}, **self.shapes}
        return [_cost(node, shapes) for node in self.nodes]

    def _share(self, nodes: int) -> float:
        total = sum(cost for place, cost in enumerate(self._cost) if place not in self.repeated)
        return sum(self._cost[place] for place in _places(nodes)) / total

    @cached_property
    def _by_row(self) -> frozenset[str]:
        """Tensors whose first axis is the batch."""
        fewer = {name: values[: len(values) - 1] for name, values in self.rows.items()}
        count = len(next(iter(self.rows.values())))
        return frozenset(
            name
            for name, values in self._run(fewer, self.producer).items()
            if values.shape[:1] == (count - 1,) and self.shapes[name] == (count, *values.shape[1:])
        )

    def _cuts(self, scope: int, output: str) -> list[_Cut]:
        """All cut points within a set of nodes whose result is `output`, which is the last of them."""
        before: dict[int, int] = {}
        readers: dict[str, int] = {}
        for place in _places(scope):
            mask = 1 << place
            for name in self.reads[place]:
                readers[name] = readers.get(name, 0) | 1 << place
                mask |= before.get(self.producer.get(name, -1), 0)
            before[place] = mask
        found = []
        for place, mask in before.items():
            leaving = [
                name
                for inside in _places(mask)
                for name in self.nodes[inside].output
                if readers.get(name, 0) & ~mask or name == output
            ]
            if len(leaving) == 1 and leaving[0] in self.nodes[place].output and self._may_be_cut(place, leaving[0]):
                found.append(_Cut(tensor=leaving[0], before=mask))
        return found

    def _may_be_cut(self, place: int, tensor: str) -> bool:
        """Rows have to come first. Between the two halves of a quantize/dequantize pair, engines fuse neither: OpenVINO
        makes its FakeQuantize of whole pairs, and what follows a lone dequantized tensor is a float operator."""
        return tensor == self.output or (kind(self.nodes[place].op_type) != "quantize" and tensor in self._by_row)

    def _row_bytes(self, tensor: str) -> float:
        shape, item_bytes = self._forms[tensor]
        return float(math.prod(shape[1:]) * item_bytes)

    def _cheap(self, cuts: Sequence[_Cut], max_segments: int) -> list[_Cut]:
        """The cut points with the fewest bytes, of as many the later, with some work between any two of them."""
        least = 1 / (2 * max_segments)
        kept = [cut for cut in cuts if cut.tensor == self.output]
        for cut in sorted(cuts, key=lambda each: (self._row_bytes(each.tensor), -self.producer[each.tensor])):
            near = any(
                other.before & cut.before in (other.before, cut.before)
                and self._share(other.before ^ cut.before) < least
                for other in kept
                if other.tensor != self.output
            )
            if cut.tensor != self.output and not near:
                kept.append(cut)
        return kept

    def _with_branches(self, region: int, output: str) -> Iterator[Segment]:
        """The segment of these nodes, or its parallel branches and what joins them."""
        branches = self._branches(region, output)
        for branch in branches:
            yield self._segment(branch.before, branch.tensor)
            region &= ~branch.before
        yield self._segment(region, output)

    def _branches(self, region: int, output: str) -> list[_Cut]:
        inside = [cut for cut in self._cuts(region, output) if cut.before != region]
        while inside:
            largest = [
                cut
                for cut in inside
                if not any(cut is not other and cut.before & ~other.before == 0 for other in inside)
            ]
            heavy = [cut for cut in largest if self._share(cut.before) >= _BRANCH_SHARE]
            if len(heavy) > 1:
                return heavy
            inside = [cut for cut in inside if cut not in largest]
        return []

    def _segment(self, nodes: int, output: str) -> Segment:
        places = tuple(_places(nodes))
        return Segment(
            writes=output,
            reads=tuple(self._outside(places)),
            nodes=places,
            share=self._share(nodes),
            row_bytes=self._row_bytes(output),
        )

    def _few(self, segments: Sequence[Segment], max_segments: int) -> tuple[Segment, ...]:
        """Joins the two neighbours with the least work, over and over, until there are few enough."""
        parts = list(segments)
        while len(parts) > max_segments:
            pairs = []
            for place, segment in enumerate(parts):
                readers = [number for number, other in enumerate(parts) if segment.writes in other.reads]
                if len(readers) == 1:
                    pairs.append((segment.share + parts[readers[0]].share, -segment.row_bytes, place, readers[0]))
            _, _, first, second = min(pairs)
            parts[second] = _joined(parts[first], parts[second])
            del parts[first]
        return tuple(parts)

    def _outside(self, places: Collection[int]) -> list[str]:
        """What the nodes read, and what is repeated for them: inputs, and tensors of other segments."""
        needed = self._needed(places)
        written = {name for place in needed for name in self.nodes[place].output}
        wanted = (name for place in sorted(needed) for name in self.reads[place])
        return list(dict.fromkeys(name for name in wanted if name not in written and name not in self.constants))

    def _needed(self, places: Collection[int]) -> set[int]:
        """The nodes with all that is repeated for them."""
        needed, pending = set(places), list(places)
        while pending:
            for name in self.reads[pending.pop()]:
                source = self.producer.get(name)
                if source is not None and source in self.repeated and source not in needed:
                    needed.add(source)
                    pending.append(source)
        return needed

    def written(self, whole: Graph, segments: Sequence[Segment], folder: Path) -> list[Graph]:
        values = {**self.rows, **self._run(self.rows, [segment.writes for segment in segments])}
        changing = self._changing([*self.inputs, *(segment.writes for segment in segments)])
        graphs = []
        for number, segment in enumerate(segments):
            place = folder / str(number)
            place.mkdir(parents=True)
            (place / "model.onnx").write_bytes(self._extracted(segment, values, changing).SerializeToString())
            inputs = {f"inputs.{name}": np.ascontiguousarray(values[name]) for name in segment.reads}
            outputs = np.ascontiguousarray(values[segment.writes])
            save_file({**inputs, "outputs": outputs}, place / "reference.safetensors")
            graphs.append(
                Graph(
                    module=whole.module,
                    onnx=place / "model.onnx",
                    signature=Signature(
                        inputs=tuple(
                            Input(name=name, shape=values[name].shape[1:], dtype=str(values[name].dtype))
                            for name in segment.reads
                        ),
                        output_shape=outputs.shape[1:],
                    ),
                    quantized=whole.quantized,
                    reference=place / "reference.safetensors",
                )
            )
        return graphs

    def _extracted(
        self, segment: Segment, values: Mapping[str, NDArray[Any]], changing: Mapping[str, Collection[int]]
    ) -> onnx.ModelProto:
        places = sorted(self._needed(segment.nodes))
        read = {name for place in places for name in self.reads[place]}
        constants = [each for each in self.model.graph.initializer if each.name in read]
        described = {name: _described(name, values[name], changing[name]) for name in (*segment.reads, segment.writes)}
        part = onnx.helper.make_graph(
            [self.nodes[place] for place in places],
            self.model.graph.name or "segment",
            [described[name] for name in segment.reads],
            [described[segment.writes]],
            initializer=constants,
        )
        return onnx.helper.make_model(
            part,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )

    def _changing(self, tensors: Sequence[str]) -> dict[str, set[int]]:
        """Axes of each tensor whose size depends on the request: the batch, and whatever changes with the lengths."""
        shorter = {
            name: values.take(range(max(1, values.shape[axes[0] + 1] // 2)), axes[0] + 1) if axes else values
            for name, axes in ((each, self.lengths[each]) for each in self.inputs)
            for values in (self.rows[name],)
        }
        axes: dict[str, set[int]] = {name: {0} for name in tensors}
        if not any(self.lengths.values()):
            return axes
        shapes = {name: values.shape for name, values in {**shorter, **self._run(shorter, tensors)}.items()}
        for name in tensors:
            known = self.shapes[name] if name in self.shapes else self.rows[name].shape
            axes[name] |= {axis for axis, size in enumerate(shapes[name]) if size != known[axis]}
        return axes

    def _run(self, rows: Mapping[str, NDArray[Any]], tensors: Collection[str]) -> dict[str, NDArray[Any]]:
        """The values of tensors that nodes write, calculated as the graph says, nothing rewritten."""
        import onnxruntime

        wanted = [name for name in tensors if name in self.producer]
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name != self.output)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(wanted, {name: rows[name] for name in self.inputs})
        return {name: np.asarray(value) for name, value in zip(wanted, values, strict=True)}

    @staticmethod
    def _mask(places: Iterator[int]) -> int:
        mask = 0
        for place in places:
            mask |= 1 << place
        return mask


def _places(mask: int) -> Iterator[int]:
    """Positions of the bits that are set, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that a node reads, those of the graphs inside it included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {name for each in inner.node for name in each.output} | {each.name for each in inner.input}
            own |= {each.name for each in inner.initializer}
            yield from (name for each in inner.node for name in _reads(each) if name not in own)


def _in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes so that each comes after those that it reads, else as they are: quantizers append theirs at the end."""
    producer = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    sources = [{producer[name] for name in _reads(node) if name in producer} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for place, it in enumerate(sources):
        for source in it:
            readers[source].append(place)
    missing = [len(it) for it in sources]
    ready, order = [place for place, number in enumerate(missing) if number == 0], []
    while ready:
        place = heapq.heappop(ready)
        order.append(nodes[place])
        for reader in readers[place]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, reader)
    return order


def _cost(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Multiply-adds of a layer with weights or of a product, elements that anything else writes."""
    written = float(sum(math.prod(shapes[name]) for name in node.output if name in shapes))
    operator, inputs = kind(node.op_type), [shapes.get(name, ()) for name in node.input]
    if operator == "convolution":
        return written * math.prod(inputs[1][1:])
    if node.op_type in ("LSTM", "GRU", "RNN"):
        steps, rows = inputs[0][:2]
        return float(steps * rows * (math.prod(inputs[1]) + math.prod(inputs[2])))
    if operator == "linear" and inputs[0]:
        return written * inputs[0][-1]
    return written


def _described(name: str, values: NDArray[Any], changing: Collection[int]) -> onnx.ValueInfoProto:
    shape = [
        ("batch" if axis == 0 else f"{name}.{axis}") if axis in changing else size
        for axis, size in enumerate(values.shape)
    ]
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(values.dtype), shape)
