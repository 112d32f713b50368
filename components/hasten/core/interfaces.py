"""What the rooms agree on. Nothing here imports a heavy library, so that the command line stays instant.

Shapes: B rows of a batch, C classes; an input shape never counts the batch dimension.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt, MinLen

from hasten.core.errors import ConfigError
from hasten.core.trial import Collective

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from hasten.core.trial import Choice, Diagnosis, Estimate, Result, Strategy, TrainingResult, Trial


INPUT = "input"
"""Name of a model's input where it has only one and nothing names it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One named input of a model.

    Attributes:
        shape: of one row; of an axis in `dynamic` the greatest size.
        dtype: `float32` or `int64`.
        dynamic: axes of the row, from 0, whose size may differ from request to request (a length).
    """

    name: str = INPUT
    shape: tuple[int, ...]
    dtype: str = "float32"
    dynamic: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "dynamic": list(self.dynamic),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Input:
        return cls(
            name=values["name"],
            shape=tuple(values["shape"]),
            dtype=values["dtype"],
            dynamic=tuple(values["dynamic"]),
        )


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What goes into a model and what comes out, per row. A model takes one input as it is, several by their names."""

    inputs: tuple[Input, ...]
    output_shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": [each.to_dict() for each in self.inputs], "output_shape": list(self.output_shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        return cls(
            inputs=tuple(Input.from_dict(each) for each in values["inputs"]),
            output_shape=tuple(values["output_shape"]),
        )


Columns = Mapping[str, "NDArray[Any]"]
"""Name -> one value a row (B, ...): numbers, or an object array (B,) of texts or of bytes (encoded images, sound)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as they came.

    Attributes:
        inputs: what the model is to learn from, before any transform.
        targets: what it is to learn, as the file has it; None for rows without labels.
        parts: which split each row belongs to: (B,) texts, or None where hasten divides all rows. A text may name
            several splits, `validate+test`, between which these rows are divided in proportion to `data.split`.
        in_order: rows are a time series: they are divided in their order, not at random.
        notes: what the user should know of how they were read ("3 files are no images and were left out: ..."), one
            sentence each.
    """

    inputs: Columns
    targets: NDArray[Any] | None
    parts: NDArray[Any] | None = None
    in_order: bool = False
    notes: tuple[str, ...] = ()

    def stream(self) -> RowStream:
        """The same rows, in one piece.

        Raises:
            ConfigError: columns differ in length.
        """
        lengths = {name: len(values) for name, values in self.inputs.items()}
        if self.targets is not None:
            lengths["the targets"] = len(self.targets)
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ConfigError(f"data gives columns of different lengths: {told}")
        return RowStream(
            num_rows=next(iter(lengths.values())),
            pieces=lambda: iter([self.inputs]),
            targets=self.targets,
            parts=self.parts,
            in_order=self.in_order,
            notes=self.notes,
        )


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """Rows as they came, whose inputs may be more than fits into memory: they are read piece by piece.

    Attributes:
        num_rows: of all pieces together.
        pieces: reads the inputs of the rows in their order, some at a time; each call begins with the first.
        targets, parts, in_order, notes: as of `Table`.
    """

    num_rows: int
    pieces: Callable[[], Iterator[Columns]]
    targets: NDArray[Any] | None
    parts: NDArray[Any] | None = None
    in_order: bool = False
    notes: tuple[str, ...] = ()


class DataSource(abc.ABC):
    """Where rows come from. Implementations are frozen dataclasses whose fields are the knobs of their YAML."""

    real: ClassVar[bool] = True
    """Whether the rows are data. What is made up can time a model, but neither train, calibrate nor judge it."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what `load` would read: equal content, equal fingerprint, whatever its path or date."""

    @abc.abstractmethod
    def load(self) -> Table:
        """Reads all rows.

        Raises:
            ConfigError: a file is missing, unreadable, or does not hold what the config says.
        """

    def stream(self) -> RowStream:
        """The rows of `load` for who takes their inputs piece by piece; here all at once.

        Raises:
            ConfigError: as `load`; what is wrong with inputs may come out when the piece is read.
        """
        return self.load().stream()


class Transform(abc.ABC):
    """A deterministic step from columns to columns, part of the deployed artefact's preprocessing.

    Implementations are frozen, keyword-only dataclasses of plain values. Their fields are the knobs of the YAML and
    what `fit` learns: a fitted transform is its own config, `{"_target_": ..., **asdict(transform)}`, and is rebuilt
    from it. They import nothing but NumPy at the top, so that a deployed model starts quickly.
    """

    elementwise: ClassVar[bool] = False
    """Whether it makes numbers of numbers, each by itself, in the same columns and shapes: where what it is given takes
    fewer bytes, prepared files may hold that, and it is applied to each batch that is read."""

    def fit(self, columns: Columns) -> Transform:
        """The transform with what it learns from the training rows filled in, where the config left it null."""
        return self

    def fit_pieces(self, pieces: Iterable[Columns]) -> Transform:
        """`fit` to training rows that come piece by piece, from the first again at each iteration.

        Here each column that `fit` asks for is put together in memory. What can learn from one piece after the other
        overrides this, and takes rows that are larger than memory.
        """
        from hasten.core.columns import Joined

        return self.fit(Joined(pieces))

    @abc.abstractmethod
    def __call__(self, columns: Columns) -> Columns:
        """The columns after the step, in the order in which the model is to take them.

        Raises:
            ConfigError: a column is missing or does not hold what the step takes, naming the column.
        """

    def dynamic(self) -> Mapping[str, tuple[int, ...]]:
        """Column that the step makes -> axes of its rows, from 0, whose size may differ from request to request."""
        return {}

    def facts(self) -> Mapping[str, int]:
        """What constructors of models may ask for by name, such as `vocabulary_size`; known after `fit`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one split: as a model takes them, or, with `deferred` transforms, as they are kept.

    Attributes:
        inputs: in the order of the signature: (B, *shape), float32 or int64. Of deferred rows the columns that the
            first transform takes; arrays may be mapped from files.
        targets: as `Task.targets` gave them: (B,) int64 classes, (B, K) float32, or (B, 0) without labels.
        in_order: they follow one another in time, so that a part that shall judge is the last, not drawn at random.
        deferred: fitted transforms that lead from `inputs` to what a model takes.
    """

    inputs: Columns
    targets: NDArray[Any]
    in_order: bool = False
    deferred: tuple[Transform, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


class Task(abc.ABC):
    """What a model's outputs mean: which targets fit, what a row's outputs look like, and the loss.

    Implementations are frozen, keyword-only dataclasses; one task is one file. The metrics of a task are declared in
    its YAML (`core.sections.Metric`).
    """

    outputs: ClassVar[Literal["classes", "numbers"]]
    """Logits of classes, or numbers that mean what they are; which distillation losses fit depends on it."""
    trains: ClassVar[bool] = True
    """Whether there is a loss: without labels, nothing can be trained."""
    learned_from: ClassVar[Literal["targets", "baseline"]] = "targets"
    """What metrics compare outputs with: the rows' targets, or the outputs of the untouched model."""

    @abc.abstractmethod
    def targets(self, given: NDArray[Any] | None, rows: int) -> NDArray[Any]:
        """Targets as the loss and the metrics take them.

        Raises:
            ConfigError: they don't fit the task, naming `data.targets`, what was given and what is allowed.
        """

    @abc.abstractmethod
    def output_shape(self, targets: NDArray[Any]) -> tuple[int, ...] | None:
        """Of one row, from all targets; None where the model decides."""

    @abc.abstractmethod
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch, a scalar."""

    def labels(self, targets: NDArray[Any]) -> NDArray[Any] | None:
        """(B,) classes by which rows are divided evenly and metrics told by class; None where there are none."""
        return None

    def constant(self, train_targets: NDArray[Any], rows: int) -> NDArray[Any] | None:
        """Outputs (rows, *output_shape) of the best answer that ignores its input; None where there is none."""
        return None


class Progress(Protocol):
    """Where long work says how far it is. `advance` is called with the number of steps done since the last call."""

    def start(self, what: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """A `Progress` that nobody watches."""

    def start(self, what: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def stop(self) -> None: ...


class Distillation(abc.ABC):
    """How a student learns from a teacher: a loss over both outputs and the labels, and over layers where it names any.

    Implementations are frozen, keyword-only dataclasses of knobs. Who teaches is not theirs to know: their YAML also
    spells `teachers`, `checkpoints` and `assistant`, which the stages read.
    """

    requires: ClassVar[tuple[str, ...]] = ("student|pruning|quantization.training",)
    """Something has to be trained after the teacher."""

    outputs: ClassVar[Literal["classes", "numbers"] | None] = None
    """What the outputs of the tasks are that the loss is for (`Task.outputs`); None for all."""

    @abc.abstractmethod
    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
        """Mean loss of a batch, a scalar. Outputs are (B, *output_shape)."""

    @property
    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Dotted paths of the student's layers and of the teacher's that they are compared with, as many of each.

        Where there are any, the teacher is asked while the student trains, not once before.
        """
        return (), ()

    def projections(
        self, student: Sequence[tuple[int, ...]], teacher: Sequence[tuple[int, ...]]
    ) -> Sequence[torch.nn.Module]:
        """What is learned along with the student to make its layers comparable; none by default.

        Args:
            student: shapes (B, ...) of what the layers give.
            teacher: the same of the teacher's.
        """
        return ()

    def layer_loss(
        self,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        projections: Sequence[torch.nn.Module],
    ) -> torch.Tensor:
        """What is added to `loss` for the outputs (B, ...) of the `layers`, a scalar; asked where there are any."""
        raise NotImplementedError


class Augment(abc.ABC):
    """A random change of training inputs that leaves their targets right. Frozen dataclasses of knobs.

    All that is random is drawn from torch's global generator, so that a resumed training draws what it would have.
    """

    @abc.abstractmethod
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A changed copy of a batch (B, *shape) of each input."""


class Bench(Protocol):
    """What a stage lends to a pass: rows, a task, a trainer, a stopwatch, a seed and a scratch folder."""

    @property
    def train(self) -> Rows: ...
    @property
    def task(self) -> Task: ...
    @property
    def seed(self) -> int: ...
    @property
    def folder(self) -> Path: ...

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        """Trains a copy of the model as the stage's `training` section says, with the recipe's distillation loss where
        one is declared, and gives it back in eval mode.

        Raises:
            PassError: the loss became NaN or infinite.
        """

    def latencies_ms(self, models: Sequence[torch.nn.Module]) -> list[float]:
        """Median latency of one request of each model on the target, as the recipe would deploy it: in its engine, and
        quantized where it says so by a `GraphPass`; what a `TrainedGraphPass` is to quantize is timed in floats. All
        are timed in turns in one session. Asked of a pass that `measures` alone.

        Raises:
            EngineError: the engine failed on a model.
            PassError: a model can't be captured or quantized.
        """

    def graph_latencies_ms(self, graphs: Sequence[Graph]) -> list[float]:
        """The same for graphs, each as it is."""


class Pass(abc.ABC):
    """A technique. Implementations are frozen, keyword-only dataclasses of knobs; they never change their input."""

    relieves: ClassVar[tuple[str, ...]]
    """The bottlenecks that the technique can relieve."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Groups that the recipe has to use (any option but none) for the technique to make sense; `a|b` is either."""
    never_with: ClassVar[tuple[str, ...]] = ()
    """Options, as `group=option`, that the technique can't be combined with."""

    @property
    def measures(self) -> bool:
        """Whether it times models on the target, so that its result depends on the engine and the machine."""
        return False

    def supports(self, target: Target) -> str | None:
        """The reason why the technique gains nothing on the target, with what would gain; None if it can."""
        return None


class ModulePass(Pass):
    """Module in, module out (structured pruning)."""

    @abc.abstractmethod
    def __call__(self, model: torch.nn.Module, bench: Bench) -> Surgery:
        """Applies the technique to a copy of the model and fine-tunes it through `bench.fit`."""


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """A changed module and what was removed from it, in order, as JSON-able data that `artefacts.module` can replay.

    Attributes:
        notes: what the report should say of how it was done and what it gave, one sentence each.
    """

    model: torch.nn.Module
    steps: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()


class GraphPass(Pass):
    """Graph in, graph out (quantization), placed for one engine family."""

    calibration_rows: int
    """Training rows that it wants to measure ranges on, at most; 0 where it needs none."""

    @abc.abstractmethod
    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path) -> tuple[str, ...]:
        """Writes `model.onnx` for the engine family into the folder.

        Args:
            graph: the float graph.
            calibration: training rows as the model takes them, `calibration_rows` of them at most.
            family: `Engine.family` of the engine that will run it.

        Returns:
            What the report should say of how it was done, one sentence each: widths that are simulated, layers that
            stay float.

        Raises:
            PassError: the technique can't be placed for this family or this graph.
        """

    def integer_share(self, graph: Graph) -> float:
        """Share of the graph's convolutions and linear layers that it can turn into integers, at most."""
        return 1.0


class TrainedGraphPass(Pass):
    """Graph in, graph out, with training or timing on the way (quantization-aware training, mixed precision)."""

    calibration_rows: int
    """As of `GraphPass`."""

    @abc.abstractmethod
    def __call__(self, graph: Graph, calibration: Columns, family: str, folder: Path, bench: Bench) -> tuple[str, ...]:
        """As of `GraphPass`; `bench.fit` trains as `quantization.training` says."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One model in the forms that engines and graph passes read.

    Attributes:
        module: folder of the float module artefact (`artefacts.module.rebuild` reads it).
        onnx: file of the graph with a dynamic batch dimension; float, or with quantize/dequantize pairs.
        quantized: whether `onnx` holds quantize/dequantize pairs.
        reference: safetensors file with `inputs.<name>` (B, *shape) for every input and `outputs` (B, *output_shape) of
            the float module in eager mode.
    """

    module: Path
    onnx: Path
    signature: Signature
    quantized: bool
    reference: Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """A shape of request that matters.

    Attributes:
        batch_size: rows.
        length: size of every dynamic axis of the inputs; None for that of the rows as the data have them.
    """

    batch_size: Annotated[int, Ge(1)]
    length: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of several devices that share the work of one model.

    Attributes:
        name: as the schedule and its chart call it.
        engine: option of the group `engine` that runs on it.
        cpus: logical CPUs that its process is confined to; of a device that is no CPU, those that feed it.
    """

    name: str
    engine: str
    cpus: Annotated[tuple[int, ...], MinLen(1)]


DeviceKind = Literal["cpu", "gpu", "tpu", "fpga"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The hardware that will run the model, and how it will be called.

    Attributes:
        device: what the model is to run on.
        reference: PyTorch's device for eager mode, which every speed-up is stated against: that of the machine at hand
            where PyTorch does not reach the device.
        threads: how many threads one request may use.
        batch_size: rows per request.
        length: size of the dynamic axes of a request; None for that of the rows as the data have them.
        also: other requests that matter: timed for the report, while `batch_size` and `length` decide.
        precisions: number formats that a candidate may calculate in.
        memory_limit_mb: of the process that compiles or serves, with its children, 1 MB = 10^6 bytes; an engine that
            needs more is stopped. None: what this machine has free, less a tenth.
        timeout_seconds: that a compile, a load, or the outputs of all rows may take before the engine is stopped.
        request_timeout_seconds: that the few requests which are timed at once may take.
        engines: options of the group `engine` that may be tried, in this order.
        devices: between which one model may be divided; none for a target of one device.
    """

    device: DeviceKind
    reference: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    length: Annotated[int, Ge(1)] | None = None
    also: tuple[Request, ...] = ()
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "float16", "int8")
    memory_limit_mb: Annotated[float, Gt(0)] | None = None
    timeout_seconds: Annotated[float, Gt(0)] = 600.0
    request_timeout_seconds: Annotated[float, Gt(0)] = 120.0
    engines: tuple[str, ...]
    devices: tuple[Device, ...] = ()

    @property
    def request(self) -> Request:
        """The request that decides."""
        return Request(batch_size=self.batch_size, length=self.length)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Target:
        """From the section of a checked config."""
        lists = {
            "also": tuple(Request(**request) for request in node.get("also", ())),
            "precisions": tuple(node["precisions"]) if "precisions" in node else cls.precisions,
            "engines": tuple(node["engines"]),
            "devices": tuple(Device(**{**each, "cpus": tuple(each["cpus"])}) for each in node.get("devices", ())),
        }
        return cls(**{**node, **lists})


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """Time of one operator within one request.

    Attributes:
        kind: `convolution`, `linear`, `normalization`, `elementwise`, `pooling`, `quantize`, `copy` or `other`.
        milliseconds: mean over the profiled requests.
        calls: executions per request.
    """

    name: str
    kind: str
    milliseconds: float
    calls: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepOperators:
    """Time of all operators of one kind in one phase of a training step, by PyTorch's profiler.

    Attributes:
        phase: `forward`, `backward` or `optimizer`.
        kind: as of an `OperatorTime`, or `optimizer` of the update's; `fused` of a compiler's own kernels.
        milliseconds: of a step.
        calls: executions per step.
        idle_ms: what so many calls of this kind take where they have nothing to do, by the same profiler.
    """

    phase: str
    kind: str
    milliseconds: float
    calls: float
    idle_ms: float


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What all operators of one kind that work on tensors of the same sizes ask for in one phase of a training step.

    Attributes:
        phase: `forward`, `backward` or `optimizer`.
        kind: as of `StepOperators`.
        calls: executions per step.
        flops: of all calls, 2 per multiply-add.
        num_bytes: that all calls read and write, each tensor once a call.
        precision: number format of the arithmetic.
    """

    phase: str
    kind: str
    calls: int
    flops: int
    num_bytes: int
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What was measured of the operators of a training step, in plain values that go from one process to another.

    Attributes:
        operators: of the passes and the update.
        work: of the same, as eager PyTorch does it.
        watched_ms: phase -> milliseconds of it in a step while its operators were timed, which takes longer.
        page_fault_us: microseconds until a page of memory that is touched for the first time is there.
        activation_bytes: kept between the passes, the most at any time of a step; without the parameters.
        collectives: by which processes that train together tell one another.
        waiting_ms: phase -> milliseconds of it in a step in which they were waited for, in the same steps as
            `watched_ms`.
    """

    operators: tuple[StepOperators, ...]
    work: tuple[StepWork, ...]
    watched_ms: Mapping[str, float]
    page_fault_us: float
    activation_bytes: int
    collectives: tuple[Collective, ...] = ()
    waiting_ms: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepFigures:
        operators = tuple(StepOperators(**each) for each in values["operators"])
        work = tuple(StepWork(**each) for each in values["work"])
        collectives = tuple(Collective(**each) for each in values["collectives"])
        return cls(**{**values, "operators": operators, "work": work, "collectives": collectives})


Runner = Callable[..., "NDArray[Any]"]
"""Takes one array (B, *shape) an input, in the order of the signature, and gives outputs (B, *output_shape)."""


@runtime_checkable
class Stream(Protocol):
    """A `Runner` that works on several requests at once, on devices that share them or the model."""

    @property
    def in_flight(self) -> int:
        """How many requests it works on at once, at most."""

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]: ...

    def stream(self, requests: Iterable[Sequence[NDArray[Any]]]) -> Iterator[NDArray[Any]]:
        """The outputs of the requests, in their order. Takes no more requests ahead than it works on."""


class Engine(abc.ABC):
    """What runs a graph on the target.

    Implementations are frozen, keyword-only dataclasses; their fields are the settings. One engine is one file. Modules
    of engines import their library inside methods, so that an engine that is not installed costs nothing and says so in
    `supports`.
    """

    family: ClassVar[str]
    """Whose fusions the quantize/dequantize pairs have to follow."""
    libraries: ClassVar[tuple[str, ...]]
    """Distributions whose versions decide what `compile` gives."""
    native_code: ClassVar[bool] = False
    """Whether `load` runs machine code out of the folder, so that a deployed artefact has to be trusted."""
    extra: ClassVar[str | None] = None
    """Extra of the distribution that installs it, `pip install 'hasten[tvm]'`; None for what is always there."""
    devices: ClassVar[tuple[DeviceKind, ...]] = ("cpu",)
    """Values of `Target.device` that it runs on."""
    emulates: ClassVar[bool] = False
    """Whether a request here only shows what the device would answer: its time says nothing about the device."""
    reads_onnx: ClassVar[bool] = False
    """Whether `compile` reads nothing but the ONNX file, signature and reference, so that it takes parts of a graph."""
    streams: ClassVar[bool] = False
    """Whether `load` may give a `Stream`, whose throughput is that of many requests at once."""
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Setting -> values worth trying on any graph, from which `engine.search_seconds` chooses by measurement. As in a
    config, the text `${target.batch_size}` stands for that of the target; what `supports` refuses is left out."""

    @property
    def concurrent(self) -> bool:
        """Whether what `load` gives may be called by several threads at once."""
        return False

    @abc.abstractmethod
    def supports(self, quantized: bool, target: Target) -> str | None:
        """The reason why this engine can't run such a graph on the target, with how to get it; None if it can."""

    @abc.abstractmethod
    def compile(self, graph: Graph, folder: Path) -> None:
        """Writes all that `load` needs into the folder; data only.

        Raises:
            EngineError: the engine refused the graph.
        """

    @abc.abstractmethod
    def load(self, folder: Path) -> Runner:
        """A callable with these settings, on what `compile` wrote. It may be a `Stream`."""

    def notes(self, folder: Path) -> tuple[str, ...]:
        """What the report should say of what `compile` wrote, one sentence each: estimates, what is emulated."""
        return ()

    @abc.abstractmethod
    def integer_share(self, folder: Path) -> float:
        """Share, in [0, 1], of the convolutions and linear layers of the optimised graph that run in integers."""

    @abc.abstractmethod
    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """Where the time of a request goes, by the engine's own profiler, mean over the repeats.

        Args:
            inputs: one array an input, as a `Runner` takes them.
        """


Edit = tuple[str, ...]
"""Overrides that turn one recipe into another, the last wins."""

SameRecipe = Callable[[int, Edit], "Trial | None"]
"""The trial of the history that has the recipe which an edit of a trial's recipe gives; None if it is new."""

Inadmissible = Callable[[int, Edit], str | None]
"""Why that recipe makes no sense; None if it does. Asked before `SameRecipe`."""


class Planner(abc.ABC):
    """Who chooses the next edit. Implementations are frozen, keyword-only dataclasses of knobs.

    Every answer is a function of the arguments alone, so that a run that is started again takes the same way.
    """

    max_trials: int
    """Trials without the baseline, at most: so many candidates may look at the validation rows."""

    @abc.abstractmethod
    def choose(
        self,
        history: Sequence[Trial],
        profile: Diagnosis,
        strategies: Sequence[Strategy],
        best: Trial,
        *,
        same_recipe: SameRecipe,
        inadmissible: Inadmissible,
    ) -> Choice | None:
        """What to try next, or None when the budget is spent or nothing is left.

        Args:
            history: all trials in their order, the baseline first.
            profile: of the best trial.
            strategies: that may be used; of equal ones the first goes first.
            best: the accepted trial that a new strategy starts from.
            same_recipe: lent by the loop; takes the number of a trial and an edit of its recipe.
            inadmissible: the same.

        Raises:
            ConfigError: a strategy makes no sense.
        """

    @abc.abstractmethod
    def why_stopped(
        self,
        history: Sequence[Trial],
        profile: Diagnosis,
        strategies: Sequence[Strategy],
        best: Trial,
        *,
        same_recipe: SameRecipe,
        inadmissible: Inadmissible,
    ) -> str:
        """Why `choose` gave None to the same arguments, in words for the user."""

    @abc.abstractmethod
    def estimate(self, history: Sequence[Trial], strategies: Sequence[Strategy]) -> Sequence[Estimate]:
        """What working off the strategies may cost at most, in their order.

        Raises:
            ConfigError: a strategy makes no sense.
        """


class Tracker(abc.ABC):
    """Where a run leaves its record for people to compare. Called from the process that decides, never from workers.

    `start` once, `record` once a trial, `finish` once. Implementations may raise: the caller wraps them so that a
    tracker never ends a run.
    """

    @abc.abstractmethod
    def start(self, name: str, config_yaml: str, overrides: Sequence[str], folder: Path) -> None:
        """Opens the record of one optimisation.

        Args:
            name: of the experiment.
            config_yaml: the composed experiment.
            overrides: what the user typed.
            folder: the run's output folder.
        """

    @abc.abstractmethod
    def record(
        self, trial: Trial, curves: Mapping[str, Mapping[str, Sequence[float]]], files: Mapping[str, Path]
    ) -> None:
        """Adds one iteration.

        Args:
            curves: stage that trained -> name of the quantity -> value per epoch.
            files: name in the record -> file to keep.
        """

    @abc.abstractmethod
    def finish(self, result: Result | TrainingResult | None, folder: Path, status: str) -> None:
        """Closes the record.

        Args:
            result: None where the run ended before it had one.
            folder: the run's output folder; what is worth keeping of it is kept.
            status: `FINISHED`, `FAILED` or `KILLED`.
        """

    @abc.abstractmethod
    def command(self) -> str | None:
        """What to type to look at the record; None where there is nothing to look at."""
