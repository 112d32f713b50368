"""What a training step of a model asks for, part by part: plain numbers, by which any number of layouts is weighed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import NamedTuple

from hasten.core.errors import HastenError


class PerRow(NamedTuple):
    """A quantity that is `fixed`, and `each` more for every row."""

    fixed: float
    each: float

    def __call__(self, rows: float) -> float:
        return self.fixed + self.each * rows

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> PerRow:
        """The line through two points (rows, quantity)."""
        each = (many[1] - few[1]) / (many[0] - few[0])
        return cls(few[1] - each * few[0], each)


NOTHING = PerRow(0, 0)


class Weight(NamedTuple):
    """A parameter.

    Attributes:
        rows: length of its first dimension, along which it is divided into shards; 1 of a scalar.
        columns: values in each; 0 of what is no matrix.
        trained: whether it has a gradient and an optimizer state.
    """

    size_bytes: int
    rows: int
    columns: int = 0
    trained: bool = True

    def shard_bytes(self, shards: int) -> float:
        """Of the largest shard: a row is never divided."""
        return self.size_bytes / self.rows * -(-self.rows // shards)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of the forward pass in which one module without children calculates, or what lies between two of them,
    and its stretch of the backward pass. Bytes are of one micro-batch.

    Attributes:
        inside: a block of the model; False for what lies outside of all.
        begins: the first part of a block.
        weights: parameters that it is the first to use.
        saved: bytes that it leaves to the backward pass.
        forward: the most bytes that there are at a time in its forward pass, with what it saves, besides what those
            before it have saved.
        backward: the same of its backward pass, besides gradients of parameters.
        output: bytes that it gives to the next.
        flops: of forward and backward pass, by PyTorch's own formulas.
        summed: bytes that tensor parallelism sums over its processes, in both passes.
        num_summed: in how many messages.
    """

    inside: bool = False
    begins: bool = False
    weights: tuple[Weight, ...] = ()
    saved: PerRow = NOTHING
    forward: PerRow = NOTHING
    backward: PerRow = NOTHING
    output: PerRow = NOTHING
    flops: PerRow = NOTHING
    summed: PerRow = NOTHING
    num_summed: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(weight.size_bytes for weight in self.weights)

    @property
    def trained_bytes(self) -> int:
        """Of its gradients."""
        return sum(weight.size_bytes for weight in self.weights if weight.trained)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A training step of a model.

    Attributes:
        parts: in the order of the forward pass.
        given_bytes: of the whole model, all of which each process is given before it takes its part.
        buffer_bytes: of the model, such as the statistics of batch normalization.
        input_bytes: of a batch.
        update_share: what the optimizer has at a time besides its states and the gradients, as a share of the bytes
            that it updates.
        state_share: the optimizer's states, likewise.
    """

    parts: tuple[Part, ...]
    given_bytes: float = 0.0
    buffer_bytes: float = 0.0
    input_bytes: PerRow = NOTHING
    update_share: float = 0.0
    state_share: float = 2.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for part in self.parts for weight in part.weights)

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.parts)

    @property
    def trained_bytes(self) -> int:
        return sum(part.trained_bytes for part in self.parts)

    def saved_bytes(self, rows: float) -> float:
        """What the forward pass leaves to the backward pass."""
        return sum(part.saved(rows) for part in self.parts)

    def flops(self, rows: float) -> float:
        return sum(part.flops(rows) for part in self.parts)

    @property
    def units(self) -> tuple[tuple[Part, ...], ...]:
        """Parts that belong together: the blocks of the model and, between them, what is outside of all."""
        found: list[list[Part]] = []
        for part in self.parts:
            if part.begins or not found or part.inside != found[-1][-1].inside:
                found.append([])
            found[-1].append(part)
        return tuple(map(tuple, found))


def deepened(two: Footprint, four: Footprint, depth: int) -> Footprint:
    """The footprint of a model with `depth` blocks, from those with two and with four: closed in the depth.

    What the model of four has more is twice the same, wherever in the model blocks are repeated: one of each is put in
    as often as is wanted.

    Raises:
        HastenError: it is not so; the model itself has to be looked at.
    """
    parts: list[Part] = []
    for kind, first, last in _differences(two.parts, four.parts):
        if kind == "equal":
            parts += four.parts[first:last]
            continue
        more = four.parts[first:last]
        half = len(more) // 2
        if kind != "insert" or [*map(_likeness, more[:half])] != [*map(_likeness, more[half:])]:
            raise HastenError("what each block of the model adds to it is not the same")
        parts += more[half:] * (depth - 2)
    buffer_bytes = two.buffer_bytes + (four.buffer_bytes - two.buffer_bytes) / 2 * (depth - 2)
    given_bytes = two.given_bytes + (four.given_bytes - two.given_bytes) / 2 * (depth - 2)
    return replace(four, parts=tuple(parts), buffer_bytes=buffer_bytes, given_bytes=given_bytes)


def _differences(one: Sequence[Part], other: Sequence[Part]) -> Iterator[tuple[str, int, int]]:
    matcher = SequenceMatcher(None, [*map(_likeness, one)], [*map(_likeness, other)], autojunk=False)
    return ((kind, first, last) for kind, _, _, first, last in matcher.get_opcodes())


def _likeness(part: Part) -> tuple[object, ...]:
    numbers = (*part.saved, *part.output, *part.flops)
    return (part.inside, part.begins, part.weights, *map(round, numbers))
