"""Sections of the config that are no components: plain values with their ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Interval, MinLen

from hasten.core.errors import ConfigError

Schedule = Literal["one_cycle", "cosine", "linear", "constant"]
Accelerator = Literal["cpu", "cuda", "tpu"]
FloatFormat = Literal["float32", "bfloat16", "float16"]
Compilation = Literal["none", "default", "reduce-overhead", "max-autotune"]
Layout = Literal["contiguous", "channels_last"]
Kernels = Literal["fused", "foreach", "for_loop"]
LearningRateScaling = Literal["none", "sqrt", "linear"]
Cache = Literal["auto", "memory", "disk", "none"]
Order = Literal["auto", "rows", "blocks"]
Spread = Literal["single", "ddp", "fsdp", "tensor", "pipeline", "hybrid", "auto"]
PipelineSchedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
Compression = Literal["none", "float16", "bfloat16", "powersgd"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. `epochs` passes over the rows, `batch_size` rows per step, `lr` the peak learning rate.

    Attributes:
        schedule: how the learning rate goes to its peak and down again; see `training.schedule`.
        patience: epochs without a lower loss on held-out training rows after which it stops and goes back to its best
            weights; None trains all epochs on all rows.
        held_out: share of the training rows that judge it and are not trained on, where there is a patience. Never
            validation rows: those choose between candidates.
    """

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    schedule: Schedule = "one_cycle"
    patience: Annotated[int, Ge(1)] | None = None
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a training step is calculated, whatever stage trains. All of it is part of the result.

    Attributes:
        precision: of the arithmetic of forward and backward passes, under autocast; weights and their updates stay
            float32. `float16` scales the loss so that small gradients do not vanish; it is for GPUs: processors without
            instructions for it take many times as long as in float32.
        compile: mode of `torch.compile`; `none` runs eager PyTorch. Kernels are not chosen by their measured times, so
            that the result is the same again.
        layout: of images and of convolutions' weights in memory.
        optimizer_kernels: how AdamW runs: all parameters in one kernel, one kernel an operation, or one by one.
        batch_factor: a step takes this many times `batch_size` rows.
        lr_scaling: what that does to the learning rate: times the factor's square root (Malladi et al. 2022, for Adam),
            times the factor (Goyal et al. 2017), or nothing.
        micro_batches: parts into which a step's rows are divided, one after the other, whose gradients add up to those
            of the whole: smaller activations. What compares rows with one another, as batch normalization and some
            distillation losses do, sees each part alone.
        activation_budget_mb: memory for activations kept from the forward to the backward pass, 1 MB = 10^6 bytes; as
            much as needed is calculated again instead of kept (Chen et al. 2016), which takes the memory of one block
            at a time besides. None keeps all.
        clip_norm: norm of all gradients together above which they are scaled down to it (Pascanu et al. 2013); None
            leaves them as they are.
    """

    precision: FloatFormat = "float32"
    compile: Compilation = "none"
    layout: Layout = "contiguous"
    optimizer_kernels: Kernels = "fused"
    batch_factor: Annotated[int, Ge(1)] = 1
    lr_scaling: LearningRateScaling = "sqrt"
    micro_batches: Annotated[int, Ge(1)] = 1
    activation_budget_mb: Annotated[float, Gt(0)] | None = None
    clip_norm: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None and self.precision == "float16":
            raise ConfigError(
                f"trainer.clip_norm={self.clip_norm:g} can't be combined with trainer.precision=float16, whose "
                "gradients are scaled: trainer.precision=bfloat16 needs no scaling"
            )
        if self.compile != "none" and self.activation_budget_mb is not None:
            raise ConfigError(
                f"trainer.activation_budget_mb={self.activation_budget_mb:g} can't be combined with "
                f"trainer.compile={self.compile}, which decides itself what is kept: set one of them to null or none"
            )

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Step:
        """From the section `trainer` of a checked config."""
        return cls(**{each.name: trainer[each.name] for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Trainer(Step):
    """Defaults of every stage's training, how its steps are calculated, and the device and threads of the process.

    Attributes:
        accelerator: the device; the order in which it adds floats is part of the result.
    """

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    threads: Annotated[int, Ge(1)]
    accelerator: Accelerator = "cpu"
    schedule: Schedule = "one_cycle"
    patience: Annotated[int, Ge(1)] | None = None
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How rows reach a training. Only the order of rows is part of the result.

    Attributes:
        cache: where training rows are kept as their transforms left them. `disk`: in files that are mapped, so that the
            system's page cache holds what is read often. `memory`: the process holds a copy. `none`: nowhere, the
            transforms run whenever a row is read. `auto`: in memory where they fit into a quarter of what is free, else
            on disk.
        row_by_row: each row is fetched, transformed and collated by itself, as by a usual `Dataset`; else a batch is
            one gather.
        order: `rows`: any row may follow any other. `blocks`: blocks of neighbouring rows are shuffled, and the rows
            within a window of blocks, so that reads stay local. `auto`: blocks where the rows take more than
            `blocks_above_mb`, else rows.
        block_rows: neighbouring rows that are read together.
        window_blocks: blocks whose rows are mixed.
        blocks_above_mb: size of the training rows from which `auto` shuffles by blocks, 1 MB = 10^6 bytes.
        workers: processes that load batches; 0: the training process does.
        ahead: batches that are ready before they are wanted: of each worker, or of a thread where there are none; 0:
            a batch is loaded when it is wanted. The thread is left out where rows are in memory and the training has
            a thread for every core: it would only slow it down.
        pin_memory: whether batches are put where a GPU copies from without waiting; only with one.
    """

    cache: Cache = "auto"
    row_by_row: bool = False
    order: Order = "auto"
    block_rows: Annotated[int, Ge(1)] = 64
    window_blocks: Annotated[int, Ge(1)] = 256
    blocks_above_mb: Annotated[float, Ge(0)] = 1000.0
    workers: Annotated[int, Ge(0)] = 0
    ahead: Annotated[int, Ge(0)] = 2
    pin_memory: bool = True


class MeshShape(NamedTuple):
    """How the processes of a training are arranged: four numbers whose product is their number.

    Attributes:
        pipeline: processes that have the layers of one model, one after the other.
        replicas: groups that each have all of the model and other rows.
        shards: processes with other rows among which each parameter, its gradient and its optimizer state are divided.
        tensor: processes with the same rows that each calculate a part of every layer.
    """

    pipeline: int
    replicas: int
    shards: int
    tensor: int

    @property
    def data(self) -> int:
        """Processes, or groups of them, with rows of their own."""
        return self.replicas * self.shards


_DIVIDING: Mapping[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("shards",),
    "tensor": ("tensor",),
    "pipeline": ("pipeline",),
    "hybrid": ("pipeline", "shards", "tensor"),
}
"""Knobs by which a kind divides the model."""


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """How a training is spread over processes, and what becomes of it when one of them dies.

    Attributes:
        kind: `ddp`: every process has the whole model and its share of each batch's rows; gradients are averaged.
            `fsdp`: as ddp, but parameters, gradients and optimizer states are divided (Zhao et al. 2023). `tensor`:
            layers are divided (Shoeybi et al. 2019). `pipeline`: the sequence of layers is (Huang et al. 2019).
            `hybrid`: all of these on one mesh. `auto`: what fits and is expected to take the least time.
        devices: processes, each with `trainer.threads` threads; 0, of auto: as many as there are cores for.
        pipeline: processes among which the sequence of layers is divided; 0: all that are left.
        shards: processes among which parameters are divided by fsdp; 0: all that are left. Where it is fewer than
            there are, groups of so many have a copy each.
        tensor: processes among which each layer is divided; 0: all that are left.
        bucket_mb: size of the buckets in which gradients are averaged while the backward pass goes on, 1 MB = 2^20
            bytes, as of PyTorch; of ddp, as are the seven after it.
        static_graph: every step uses the same parameters in the same order.
        unused_parameters: some parameters may have no part in a step's loss.
        bucket_views: gradients lie in their buckets, and are not copied there.
        compression: of gradients on their way: in half precision, or as a product of two thin matrices
            (PowerSGD, Vogels et al. 2019), with error feedback.
        powersgd_rank: columns of these matrices.
        powersgd_start: steps before the first that is compressed by PowerSGD.
        average_every: steps after which processes average their parameters, in place of every step's gradients (local
            SGD, Stich 2019); 1: gradients, at every step. Of ddp. Between them each goes by its own rows, to which
            clipping and batch normalization keep too. The moments of its optimizer are never averaged. A checkpoint
            has those of each process; what goes on from it in another arrangement ends otherwise than it would have.
        reduce_precision: of gradients while fsdp sums them.
        cpu_offload: what fsdp divides lies in the processor's memory while it is not used.
        reshard: fsdp divides the parameters of a block again after its forward pass, and collects them once more for
            the backward pass; false keeps them.
        sequence_parallel: what tensor parallelism does not divide by its plan it divides along the sequence
            (Korthikanti et al. 2022), where the plan says so.
        schedule: of a pipeline's micro-batches, of which there are `trainer.micro_batches`.
        timeout_seconds: after which a collective that somebody does not come to ends the process.
        max_restarts: times that the processes are started again, from the last checkpoint, after one has died.
        mtbf_hours: mean time between failures of any of the processes, by which the interval of checkpoints is chosen
            from what one costs (Young 1974; Daly 2006); None: `callbacks.checkpoint_seconds`.
        bandwidth_mbit: between two processes, 10^6 bits per second, by which auto chooses; None: what is measured.
        memory_limit_mb: of each process, 1 MB = 10^6 bytes, by which auto chooses; None: what is free is shared.
    """

    kind: Spread = "single"
    devices: Annotated[int, Ge(0)] = 1
    pipeline: Annotated[int, Ge(0)] = 1
    shards: Annotated[int, Ge(0)] = 1
    tensor: Annotated[int, Ge(0)] = 1
    bucket_mb: Annotated[float, Gt(0)] = 25.0
    static_graph: bool = False
    unused_parameters: bool = False
    bucket_views: bool = True
    compression: Compression = "none"
    powersgd_rank: Annotated[int, Ge(1)] = 1
    powersgd_start: Annotated[int, Ge(2)] = 10
    average_every: Annotated[int, Ge(1)] = 1
    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    cpu_offload: bool = False
    reshard: bool = True
    sequence_parallel: bool = False
    schedule: PipelineSchedule = "1F1B"
    timeout_seconds: Annotated[float, Gt(0)] = 60.0
    max_restarts: Annotated[int, Ge(0)] = 3
    mtbf_hours: Annotated[float, Gt(0)] | None = None
    bandwidth_mbit: Annotated[float, Gt(0)] | None = None
    memory_limit_mb: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.kind == "auto":
            return  # what it is to be is checked when it has been chosen
        if self.devices == 0:
            raise ConfigError(
                f"distributed.devices=0 leaves their number to distributed=auto, and distributed={self.kind} needs one"
            )
        if self.kind == "single" and self.devices > 1:
            raise ConfigError(
                f"distributed=single is one process, and distributed.devices={self.devices}: distributed=ddp spreads a "
                "training over several"
            )
        if self.local_steps and self.compression != "none":
            raise ConfigError(
                f"distributed.average_every={self.average_every} sends no gradients that distributed.compression="
                f"{self.compression} could compress: one of them"
            )
        dividing = _DIVIDING.get(self.kind, ())
        for knob in ("pipeline", "shards", "tensor"):
            if knob not in dividing and (given := getattr(self, knob)) != 1:
                raise ConfigError(
                    f"distributed.{knob}={given} is none of distributed={self.kind}'s: distributed=hybrid combines "
                    "pipeline, shards and tensor"
                )
        self.mesh(self.devices)

    @property
    def local_steps(self) -> bool:
        """Whether processes take steps by their own rows, and average their parameters now and then."""
        return self.average_every > 1

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Distributed:
        """From the section `distributed` of a checked config."""
        return cls(**section)

    def mesh(self, size: int) -> MeshShape:
        """How so many processes are arranged; those that divide nothing are replicas.

        Raises:
            ConfigError: they can't be divided like that.
        """
        wanted = {name: getattr(self, name) for name in ("pipeline", "shards", "tensor")}
        told = ", ".join(f"distributed.{name}={number}" for name, number in wanted.items() if number != 1)
        left, rest = divmod(size, math.prod(number for number in wanted.values() if number))
        if rest or not left:
            raise ConfigError(f"distributed.devices={size} can't be divided by {told}")
        open_ = [name for name, number in wanted.items() if number == 0]
        if len(open_) > 1:
            raise ConfigError(f"{told}: only one of them can be 0, which is all that are left")
        filled = wanted | dict.fromkeys(open_, left)
        shape = MeshShape(replicas=1 if open_ else left, **filled)
        if self.kind in ("tensor", "pipeline") and shape.data > 1:
            raise ConfigError(
                f"distributed={self.kind} with {told} leaves {shape.data} groups of distributed.devices={size}: "
                "distributed=hybrid gives them rows of their own"
            )
        return shape

    @property
    def result(self) -> dict[str, Any]:
        """What decides the result of a training; empty where one process trains."""
        if self.kind == "single":
            return {}
        return {name: value for name, value in asdict(self).items() if name not in _RUNNING}

    @property
    def lossy(self) -> dict[str, Any]:
        """What changes the result by more than rounding, in whatever arrangement of processes."""
        compressed = {"powersgd": ("powersgd_rank", "powersgd_start")}.get(self.compression, ())
        names = ("compression", *compressed, "average_every", "reduce_precision")
        return {name: value for name in names if (value := getattr(self, name)) != _EXACT.get(name)}


_EXACT = {"compression": "none", "average_every": 1, "reduce_precision": "float32"}
"""Knobs of `distributed` with the values that leave gradients as they are."""
_RUNNING = ("timeout_seconds", "max_restarts", "mtbf_hours", "bandwidth_mbit", "memory_limit_mb")
"""Knobs of `distributed` that leave the result of a training as it is."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    checkpoint_seconds: Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of the rows."""

    train: Annotated[float, Interval(gt=0, lt=1)]
    validate: Annotated[float, Interval(gt=0, lt=1)]
    test: Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How well a model does, and how much of it may be lost.

    Attributes:
        name: key below `task.metrics`.
        target: dotted path of a function of (outputs, targets) that gives one score a row (N,), or one number for all.
        max_drop: largest tolerated loss at the objective's confidence; None where it is only measured.
        relative: the loss is a share of the baseline's value.
        by_class: the loss of every single class has to hold; only of scores per row.
    """

    name: str
    target: str
    higher_is_better: bool = True
    max_drop: Annotated[float, Ge(0)] | None = None
    relative: bool = False
    by_class: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the processes of a run on several hosts come from: what `hasten launch` writes scripts of.

    Attributes:
        command: pipeline that they run.
        nodes: hosts, each with `distributed.devices / nodes` processes.
        min_nodes: hosts with which a run goes on when others are lost; None for all.
        first: name or address of the first host, as the others reach it; None: the shell variable FIRST_NODE.
        port: of the first host, at which torchrun's agents meet.
        join_seconds: that agents wait for one another.
        start: `ray`: starts the run at once, in workers of Ray Train; `none`: prints what would start it.
        ray_address: of the Ray cluster; None for that of RAY_ADDRESS, or one of this machine alone.
        show: what is printed.
        write: folder that the scripts are written to; None for none.
        python: interpreter on the hosts.
        name: of the job.
        time: of SLURM, as its `--time`; None for the partition's own.
        partition: of SLURM; None for the default one.
        image: of Kubernetes' containers.
        namespace: of Kubernetes; None for that of the context.
        volume: name of the persistent volume claim that all containers share.
        mount: where it is, and where they work.
        memory_gb: of a container, 1 GB = 10^9 bytes; None for no limit.
    """

    command: Literal["run", "optimize", "profile"] = "run"
    nodes: Annotated[int, Ge(1)] = 1
    min_nodes: Annotated[int, Ge(1)] | None = None
    first: str | None = None
    port: Annotated[int, Interval(ge=1, le=65535)] = 29400
    join_seconds: Annotated[int, Ge(1)] = 600
    start: Literal["none", "ray"] = "none"
    ray_address: str | None = None
    show: Literal["all", "torchrun", "slurm", "kubernetes"] = "all"
    write: str | None = None
    python: str = "python"
    name: str = "hasten"
    time: str | None = None
    partition: str | None = None
    image: str = "hasten:latest"
    namespace: str | None = None
    volume: str = "hasten"
    mount: str = "/hasten"
    memory_gb: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ConfigError(
                f"launch.name must be at most 40 small letters, digits and inner hyphens, got {self.name!r}: it is "
                "part of hosts' names"
            )

    def processes(self, spread: Distributed) -> int:
        """On each host.

        Raises:
            ConfigError: the trainings can't be divided among the hosts.
        """
        if spread.devices % self.nodes:
            raise ConfigError(
                f"distributed.devices={spread.devices} can't be divided by launch.nodes={self.nodes}: every host has "
                "as many processes"
            )
        each = spread.devices // self.nodes
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ConfigError(f"launch.min_nodes={self.min_nodes} is more than launch.nodes={self.nodes}")
        for left in range(self.min_nodes or self.nodes, self.nodes):
            try:
                spread.mesh(left * each)
            except ConfigError as error:
                raise ConfigError(f"launch.min_nodes={self.min_nodes} allows for {left} hosts: {error}") from None
        return each


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search over the space, whose jobs `hasten -m` runs.

    Attributes:
        sampler: who proposes (`planning.sampling.Sampler`).
        startup_trials: of tpe, drawn at random before it learns; of nsga2, the size of a generation.
        n_trials: recipes that are tried, by all who search the same together.
        n_jobs: that a launcher is given at once; None for as many as it runs at a time.
        timeout: seconds after which nothing new begins; None for no limit.
        objectives: what is to be best, one or several (`sweeping.optuna.DIRECTIONS`).
        rungs: overrides at which each recipe is tried one after the other, the cheapest first; an empty list is the
            recipe as it is.
        pruner: which recipes go on to the next rung. halving: the best `keep` of those that were tried there; median,
            hyperband: Optuna's, for one objective; none: all that break no limit which training does not mend.
        storage: URL of a database; None for a file in the folder of the sweep.
        study: name in it; None for that of the folder.
    """

    sampler: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    startup_trials: Annotated[int, Ge(1)] = 8
    seed: Annotated[int, Ge(0)] = 0
    n_trials: Annotated[int, Ge(1)] = 30
    n_jobs: Annotated[int, Ge(1)] | None = None
    timeout: Annotated[float, Gt(0)] | None = None
    objectives: Annotated[list[Literal["latency", "throughput", "size", "memory", "quality", "training"]], MinLen(1)]
    rungs: Annotated[list[list[str]], MinLen(1)]
    pruner: Literal["halving", "median", "hyperband", "none"] = "halving"
    keep: Annotated[float, Interval(gt=0, le=1)] = 0.5
    storage: str | None = None
    study: str | None = None

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Search:
        """From the section `hparams_search` of a checked config."""
        return cls(**{each.name: node[each.name] for each in fields(cls)})
