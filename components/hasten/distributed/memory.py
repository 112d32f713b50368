"""Memory of a process that trains, from the footprint of the model and how it is spread: closed formulas.

    peak = weights + gradients that last + optimizer states + buffers of communication
           + the larger of what forward and backward passes and what the update of the weights have at a time

An estimate counts tensors. What kernels take for themselves, and what the allocator does not give back, is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hasten.core.schedules import TWO_STAGES, V_SHAPED, num_stages, stages_of
from hasten.core.sections import Distributed, MeshShape, Step
from hasten.distributed.footprint import Footprint, Part, Weight

_FLOAT_BYTES = 4
_ARITHMETIC_PER_BYTE = 8
"""Floating-point operations that take about as long as moving a byte (Williams et al. 2009)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the process that needs most.

    Attributes:
        given: the model as the process was given it, of which it trains a copy.
        weights: parameters and buffers of its part of the model.
        gradients: what lasts from one step to the next; those that come and go are part of `passes`.
        states: of the optimizer.
        passes: the most that forward and backward passes have at a time: the batch, activations, gradients, and what
            is collected or sent meanwhile.
        communication: buffers that last.
        update: the most that the update of the weights has at a time, when what the passes had is gone.
        before: the most that it has at a time before the first step, where that is much.
    """

    given: float
    weights: float
    gradients: float
    states: float
    passes: float
    communication: float
    update: float
    before: float = 0.0

    @property
    def peak(self) -> float:
        lasting = self.given + self.weights + self.gradients + self.states + self.communication
        return max(lasting + max(self.passes, self.update), self.before)


def needed(footprint: Footprint, spread: Distributed, rows: int, step: Step) -> Memory:
    """What the training takes.

    Args:
        footprint: of the model as each process calculates it: with the layers that tensor parallelism divides divided.
        rows: of a whole step, of all processes.
    """
    shape = spread.mesh(spread.devices)
    own = -(-rows // (shape.data * step.micro_batches))
    if shape.pipeline > 1:
        processes = range(shape.pipeline)
        return max((_of_stage(footprint, spread, shape, own, step, each) for each in processes), key=lambda it: it.peak)
    if spread.kind == "ddp" or shape.data == 1:
        return _whole(footprint, spread, own, step)
    return _sharded(footprint, spread, shape, own, step)


def _whole(footprint: Footprint, spread: Distributed, rows: int, step: Step) -> Memory:
    """Where the process has all of the model that it calculates."""
    trained = footprint.trained_bytes
    lasting, communication, sent = 0.0, 0.0, 0.0
    if spread.kind == "ddp":
        lasting = trained if spread.bucket_views else 2 * trained
        communication, sent = _compressed(footprint, spread)
    elif step.micro_batches > 1:
        lasting = trained
    passes = _passes(footprint.parts, rows, lasts=lasting > 0, sent=sent)
    return Memory(
        given=footprint.given_bytes,
        weights=footprint.weight_bytes + footprint.buffer_bytes,
        gradients=lasting,
        states=footprint.state_share * trained,
        passes=footprint.input_bytes(rows * step.micro_batches) + passes,
        communication=communication,
        update=(0 if lasting else trained) + footprint.update_share * trained,
    )


def _passes(parts: Sequence[Part], rows: float, *, lasts: bool, sent: float = 0.0, more: float = 0.0) -> float:
    """The most that forward and backward passes of a micro-batch have at a time.

    Args:
        lasts: there is room for the gradients already, to which those of each part are copied or added.
        sent: what else there is of gradients that are on their way, as a share of their bytes: all that there are
            already, where the network is slow.
        more: there is meanwhile.
    """
    saved = most = 0.0
    for part in parts:
        most = max(most, saved + part.forward(rows))
        saved += part.saved(rows)
    done = 0.0
    for part in reversed(parts):
        saved -= part.saved(rows)
        done += part.trained_bytes
        gradients = part.trained_bytes if lasts else done
        most = max(most, saved + part.backward(rows) + gradients + sent * done)
    return most + more


def _compressed(footprint: Footprint, spread: Distributed) -> tuple[float, float]:
    """What a compression keeps, and what it has of gradients on their way, as a share of them."""
    if spread.compression == "powersgd":
        matrices = [weight for weight in footprint.weights if weight.columns and weight.trained]
        thin = sum(spread.powersgd_rank * (weight.rows + weight.columns) * _FLOAT_BYTES for weight in matrices)
        return footprint.trained_bytes + thin, 1.0
    return 0.0, 0.0 if spread.compression == "none" else 0.5


def _sharded(footprint: Footprint, spread: Distributed, shape: MeshShape, rows: int, step: Step) -> Memory:
    """Fully sharded: each block is collected for its passes, and what is outside of all blocks for the whole step."""
    trained = _shards((weight for weight in footprint.weights if weight.trained), shape.shards)
    adds_up = step.micro_batches > 1
    passes = _collecting_passes(footprint.units, rows, shape.shards, reshard=spread.reshard, adds_up=adds_up)
    return Memory(
        given=footprint.given_bytes,
        weights=_shards(footprint.weights, shape.shards) + footprint.buffer_bytes,
        gradients=0.0,
        states=footprint.state_share * trained,
        passes=footprint.input_bytes(rows * step.micro_batches) + passes,
        communication=0.0,
        update=trained + footprint.update_share * trained,
    )


def _collecting_passes(
    units: Sequence[tuple[Part, ...]], rows: float, shards: int, *, reshard: bool, adds_up: bool
) -> float:
    """The most that forward and backward passes have at a time where blocks are collected for them (PyTorch's FSDP2).

    A collected block lies in the buffer of the collective and, copied out of it, in its parameters; in the forward pass
    the buffer stays until the next block is collected, and in the backward pass the block before is collected already.
    Gradients of a block are copied into a buffer that is reduced, which stays until the next block's is; gloo sums in
    another. Gradients that only add up from micro-batch to micro-batch are whole.
    """
    sizes = [_weight_bytes(unit) if unit[0].inside else 0.0 for unit in units]
    outside = sum(_weight_bytes(unit) for unit in units if not unit[0].inside)
    most = saved = collected = 0.0
    for unit, size in zip(units, sizes, strict=True):
        for part in unit:
            most = max(most, outside + collected + 2 * size + saved + part.forward(rows))
            saved += part.saved(rows)
        collected += 0.0 if reshard else size
    whole = sum(part.trained_bytes for unit in units for part in unit) if adds_up else 0.0
    divided = left = reduced = 0.0  # gradients of blocks that are done, of what is outside, in the buffer of the last
    for number, (unit, size) in reversed([*enumerate(zip(units, sizes, strict=True))]):
        ahead = next((each for each in reversed(sizes[:number]) if each), 0.0)
        weights = outside + (collected if collected else size + ahead)
        own = 0.0
        for part in reversed(unit):
            saved -= part.saved(rows)
            own += part.trained_bytes
            gradients = max(whole, left + own) + divided + (reduced if size else 0.0)
            most = max(most, weights + saved + part.backward(rows) + gradients)
        if size:
            most = max(most, weights - size + saved + max(whole, left + own) + 2 * own + divided)
            divided += own / shards
            reduced = own
        else:
            left += own
    return max(most, outside + max(whole, left) + 2 * left + divided)


def _of_stage(
    footprint: Footprint, spread: Distributed, shape: MeshShape, rows: int, step: Step, process: int
) -> Memory:
    """One process of a pipeline: its stages, and the activations of as many micro-batches as are on their way."""
    stages = cut(footprint, num_stages(spread.schedule, shape.pipeline), rows)
    own = [stages[number] for number in stages_of(spread.schedule, shape.pipeline, process)]
    parts = [part for stage in own for part in stage]
    weights, trained = _weight_bytes(parts), sum(part.trained_bytes for part in parts)
    if shape.shards > 1:
        weights = _shards((weight for part in parts for weight in part.weights), shape.shards)
        mine = _shards((weight for part in parts for weight in part.weights if weight.trained), shape.shards)
    else:
        mine = trained
    waiting = in_flight(spread.schedule, shape.pipeline, process, step.micro_batches)
    largest = max(sum(part.saved(rows) for part in stage) for stage in own)
    one = max(_passes(stage, rows, lasts=True) - sum(part.saved(rows) for part in stage) for stage in own)
    collected = trained if shape.shards > 1 else 0.0
    borders = sum(
        stages[number - 1][-1].output(rows) if number else 0.0
        for number in stages_of(spread.schedule, shape.pipeline, process)
    ) + sum(
        stages[number][-1].output(rows) if number < len(stages) - 1 else 0.0
        for number in stages_of(spread.schedule, shape.pipeline, process)
    )
    share = sum(part.weight_bytes for part in parts) / max(1, footprint.weight_bytes)
    averaged = min(trained, spread.bucket_mb * 2**20) if shape.data > 1 and shape.shards == 1 else 0.0
    return Memory(
        given=footprint.given_bytes,
        weights=weights + footprint.buffer_bytes * share,
        gradients=trained if shape.shards == 1 else mine,
        states=footprint.state_share * mine,
        passes=footprint.input_bytes(rows * step.micro_batches) + waiting * largest + one + 3 * collected + averaged,
        communication=borders * step.micro_batches,
        update=footprint.update_share * mine,
        before=_cutting(footprint, rows) if process == 0 else 0.0,
    )


_COPIES = 5
"""Of the model, with the first process while it finds out where to cut: as it was given, its own, one that is timed
with its gradients, and one on which the cut is tried."""


def _cutting(footprint: Footprint, rows: float) -> float:
    """What the first process of a pipeline has while it finds out where to cut, block by block."""
    handed = sum(unit[-1].output(rows) for unit in footprint.units)
    return _COPIES * footprint.given_bytes + handed + max(_passes(unit, rows, lasts=False) for unit in footprint.units)


def in_flight(schedule: str, processes: int, process: int, micro_batches: int) -> int:
    """Micro-batches of a stage whose activations a process has at a time, over both of its stages where it has two.

    GPipe and LoopedBFS take all forward passes first. With 1F1B the first process is ahead of the last by one for each
    process (Narayanan et al. 2021); with two stages the first of them is ahead by as many again.
    """
    if schedule in ("GPipe", "LoopedBFS"):
        return micro_batches * (2 if schedule in TWO_STAGES else 1)
    if schedule in V_SHAPED:
        return min(2 * micro_batches, 2 * processes)
    if schedule in TWO_STAGES:
        return min(2 * micro_batches, 2 * (processes - process - 1) + processes + 1)
    return min(micro_batches, processes - process)


def cut(footprint: Footprint, stages: int, rows: float) -> list[tuple[Part, ...]]:
    """The model in so many contiguous stages, of which the one with the most work has the least possible.

    Blocks are kept whole where there are enough of them and the stages come out about even.

    Raises:
        ValueError: it has fewer parts.
    """
    whole = divided([*footprint.units], stages, rows)
    fine = divided([(part,) for part in footprint.parts], stages, rows)
    if whole is None:
        if fine is None:
            raise ValueError(f"{len(footprint.parts)} parts can't be cut into {stages} stages")
        return fine
    even = 1.1 * max(sum(work(part, rows) for part in stage) for stage in fine or whole)
    return whole if fine is None or max(sum(work(part, rows) for part in stage) for stage in whole) <= even else fine


def divided(pieces: Sequence[tuple[Part, ...]], stages: int, rows: float) -> list[tuple[Part, ...]] | None:
    """The cut of a sequence of pieces whose largest stage is the smallest; None where there are too few."""
    if len(pieces) < stages:
        return None
    sums = [0.0, *accumulate(sum(work(part, rows) for part in piece) for piece in pieces)]
    best = [[sums[end] for end in range(len(sums))]]
    starts: list[list[int]] = []
    for stage in range(1, stages):
        row, chosen = [], []
        for end in range(len(sums)):
            options = [(max(best[-1][start], sums[end] - sums[start]), start) for start in range(stage, end)]
            least = min(options, default=(float("inf"), 0))
            row.append(least[0])
            chosen.append(least[1])
        best.append(row)
        starts.append(chosen)
    borders = [len(pieces)]
    for chosen in reversed(starts):
        borders.insert(0, chosen[borders[0]])
    borders.insert(0, 0)
    return [tuple(part for piece in pieces[start:end] for part in piece) for start, end in pairwise(borders)]


def work(part: Part, rows: float) -> float:
    """Floating-point operations, with those that would take as long as its bytes take to be moved."""
    return part.flops(rows) + _ARITHMETIC_PER_BYTE * (part.forward(rows) + part.backward(rows))


def _weight_bytes(parts: Iterable[Part]) -> float:
    return float(sum(part.weight_bytes for part in parts))


def _shards(weights: Iterable[Weight], shards: int) -> float:
    return sum(weight.shard_bytes(shards) for weight in weights)
