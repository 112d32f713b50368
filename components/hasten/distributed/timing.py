"""How long a training step takes: what is calculated, what is sent and not hidden behind it, and who waits for whom.

step = forward and backward passes + update of the weights + communication that nothing hides + pipeline bubble
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hasten.core.schedules import num_stages, stages_of
from hasten.core.sections import Distributed, MeshShape, Step
from hasten.distributed.bubble import bubble_share
from hasten.distributed.footprint import Footprint, Part, PerRow
from hasten.distributed.link import Link
from hasten.distributed.memory import cut, work

_FLOAT_BYTES = 4
_FIRST_BUCKET_BYTES = 2**20
"""Of PyTorch's ddp, so that averaging begins early."""
_BACKWARD_SHARE = 2 / 3
"""Of forward and backward pass: gradients of inputs and of weights are each as much as the outputs."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What the machine and the network do.

    Attributes:
        passes: seconds of one process' forward and backward pass of a micro-batch, of the whole model.
        update: seconds in which it updates all of the model's weights.
        link: between two processes.
        crowding: how many times as long all takes because processes share the cores; 1 where each has its own.
        low_rank: seconds of PowerSGD's own arithmetic for all matrices of the model.
    """

    passes: PerRow
    update: float
    link: Link
    crowding: float = 1.0
    low_rank: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        passes: forward and backward passes of the process that has most to do, and arithmetic of a compression.
        update: of the weights.
        communication: that nothing hides.
        waiting: for the other stages of a pipeline.
    """

    passes: float
    update: float
    communication: float = 0.0
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        return self.passes + self.update + self.communication + self.waiting


def step_time(whole: Footprint, own: Footprint, spread: Distributed, rows: int, step: Step, speeds: Speeds) -> StepTime:
    """Expected of a step.

    Args:
        whole: of the model, of which `speeds` tells.
        own: as each process calculates it: with the layers divided that tensor parallelism divides.
        rows: of a whole step, of all processes.
    """
    shape = spread.mesh(spread.devices)
    each = -(-rows // (shape.data * step.micro_batches))
    less = _work(own.parts, each) / _work(whole.parts, each) if shape.tensor > 1 else 1.0
    passes = speeds.crowding * less * speeds.passes(each)
    update = speeds.crowding * speeds.update * own.trained_bytes / max(1, whole.trained_bytes)
    summed = step.micro_batches * sum(
        part.num_summed * speeds.link.all_reduce(part.summed(each) / part.num_summed, shape.tensor)
        for part in own.parts
        if part.num_summed
    )
    if shape.pipeline > 1:
        return _pipelined(own, spread, shape, each, step, speeds, passes, update, summed)
    if spread.kind == "ddp":
        exposed, more = _averaging(own, spread, shape, passes, each, speeds)
        return StepTime(passes=step.micro_batches * passes + more, update=update, communication=exposed)
    communication = summed + (_collecting(own, spread, shape, step, speeds.link) if shape.data > 1 else 0.0)
    return StepTime(passes=step.micro_batches * passes, update=update / shape.shards, communication=communication)


def _averaging(
    footprint: Footprint, spread: Distributed, shape: MeshShape, passes: float, rows: float, speeds: Speeds
) -> tuple[float, float]:
    """Seconds of ddp's communication that the backward pass does not hide, and of a compression's arithmetic."""
    link, size = speeds.link, shape.data
    if size == 1:
        return 0.0, 0.0
    if spread.average_every > 1:
        return link.all_reduce(footprint.weight_bytes, size) / spread.average_every, 0.0
    buckets = [*_buckets(footprint, spread, passes, rows)]
    if spread.compression == "powersgd":  # one bucket after the other, in three messages: vectors and two thin matrices
        matrices = [weight for weight in footprint.weights if weight.columns and weight.trained]
        column = spread.powersgd_rank * _FLOAT_BYTES
        thin = (column * sum(each.rows for each in matrices), column * sum(each.columns for each in matrices))
        vectors = sum(it.size_bytes for it in footprint.weights if it.trained and not it.columns)
        sent = sum(link.all_reduce(num_bytes / len(buckets), size) for num_bytes in (vectors, *thin))
        return sent * len(buckets), speeds.crowding * speeds.low_rank
    share = 1.0 if spread.compression == "none" else 0.5
    end = 0.0
    for ready, num_bytes in buckets:
        end = max(end, ready) + link.all_reduce(share * num_bytes, size)
    return max(0.0, end - _BACKWARD_SHARE * passes), 0.0


def _buckets(footprint: Footprint, spread: Distributed, passes: float, rows: float) -> Iterator[tuple[float, float]]:
    """When the gradients of each bucket are there, in seconds from the begin of the backward pass, and their bytes."""
    whole, done, filled = _work(footprint.parts, rows), 0.0, 0.0
    room: float = _FIRST_BUCKET_BYTES
    for part in reversed(footprint.parts):
        done += work(part, rows)
        for weight in reversed(part.weights):
            filled += weight.size_bytes if weight.trained else 0
            if filled >= room:
                yield _BACKWARD_SHARE * passes * done / whole, filled
                filled, room = 0.0, spread.bucket_mb * 2**20
    if filled:
        yield _BACKWARD_SHARE * passes, filled


def _collecting(footprint: Footprint, spread: Distributed, shape: MeshShape, step: Step, link: Link) -> float:
    """Seconds in which fsdp collects parameters and reduces gradients; gloo hides none of them."""
    half = 0.5 if spread.reduce_precision == "bfloat16" else 1.0
    seconds = 0.0
    for unit in footprint.units:
        weights = sum(part.weight_bytes for part in unit)
        times = 2 if unit[0].inside and spread.reshard else 1
        seconds += step.micro_batches * times * link.gather(weights, shape.shards)
        trained = half * sum(part.trained_bytes for part in unit)
        # Gloo sums all and keeps a part.
        seconds += link.all_reduce(trained, shape.shards) + link.all_reduce(trained / shape.shards, shape.replicas)
    return seconds


def _pipelined(
    footprint: Footprint,
    spread: Distributed,
    shape: MeshShape,
    rows: float,
    step: Step,
    speeds: Speeds,
    passes: float,
    update: float,
    summed: float,
) -> StepTime:
    """The process with the most work sets the pace; filling and draining are the bubble."""
    link, number = speeds.link, step.micro_batches
    stages = cut(footprint, num_stages(spread.schedule, shape.pipeline), rows)
    each = [
        [part for stage in stages_of(spread.schedule, shape.pipeline, process) for part in stages[stage]]
        for process in range(shape.pipeline)
    ]
    slowest = max(_work(parts, rows) for parts in each) / _work(footprint.parts, rows)
    most = max(sum(part.trained_bytes for part in parts) for parts in each)
    busy = number * passes * slowest
    share = bubble_share(spread.schedule, shape.pipeline, number)
    # Both ways for each micro-batch. While one is on its way another is calculated, where there is one.
    handed = [2 * link.message(stage[-1].output(rows)) for stage in stages[:-1]]
    sent = max(0.0, number * max(handed) - busy) + sum(handed)
    averaged = link.all_reduce(most, shape.data) if shape.data > 1 else 0.0
    return StepTime(
        passes=busy,
        update=update * most / max(1, footprint.trained_bytes) / shape.shards,
        communication=sent + averaged + summed / shape.pipeline,
        waiting=busy * share / (1 - share),
    )


def _work(parts: Sequence[Part], rows: float) -> float:
    return sum(work(part, rows) for part in parts)
