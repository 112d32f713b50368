"""What the rooms agree on. Nothing here imports a heavy library, so that the command line stays instant.

Shapes: B rows of a batch, C classes; an input shape never counts the batch dimension.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from annotated_types import Ge

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hasten.core.trial import Choice, Estimate, Profile, Result, Strategy, Trial


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What goes into a model and what comes out, per row."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    input_dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "input_dtype": self.input_dtype,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        return cls(
            input_shape=tuple(values["input_shape"]),
            output_shape=tuple(values["output_shape"]),
            input_dtype=values["input_dtype"],
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as they came: inputs (B, *input_shape) and integer class labels (B,)."""

    inputs: NDArray[Any]
    targets: NDArray[Any]


class DataSource(abc.ABC):
    """Where rows come from. Implementations are frozen dataclasses whose fields are the knobs of their YAML."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what `load` would read: equal content, equal fingerprint, whatever its path or date."""

    @abc.abstractmethod
    def load(self) -> Table:
        """Reads all rows.

        Raises:
            ConfigError: a file is missing, unreadable, or does not hold what the config says.
        """


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Normalised inputs (B, *input_shape, float32) and labels (B, int64) of one split."""

    inputs: NDArray[np.float32]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.inputs)


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
    """How a student learns from a teacher: a loss over both outputs and the labels."""

    requires: ClassVar[tuple[str, ...]] = ("student|pruning",)
    """Something has to be trained after the teacher."""

    @abc.abstractmethod
    def loss(self, student_BC: torch.Tensor, teacher_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch, a scalar."""


class Bench(Protocol):
    """What a stage lends to a pass: rows, a trainer, a seed and a scratch folder."""

    @property
    def train(self) -> Rows: ...
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


class Pass(abc.ABC):
    """A technique. Implementations are frozen, keyword-only dataclasses of knobs; they never change their input."""

    relieves: ClassVar[tuple[str, ...]]
    """The bottlenecks that the technique can relieve."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Groups that the recipe has to use (any option but none) for the technique to make sense; `a|b` is either."""
    never_with: ClassVar[tuple[str, ...]] = ()
    """Options, as `group=option`, that the technique can't be combined with."""


class ModulePass(Pass):
    """Module in, module out (structured pruning)."""

    @abc.abstractmethod
    def __call__(self, model: torch.nn.Module, bench: Bench) -> Surgery:
        """Applies the technique to a copy of the model and fine-tunes it through `bench.fit`."""


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """A changed module and what was removed from it, in order, as JSON-able data that `artefacts.module` can replay."""

    model: torch.nn.Module
    steps: tuple[Mapping[str, Any], ...]


class GraphPass(Pass):
    """Graph in, graph out (quantization), placed for one engine family."""

    calibration_rows: int
    """Training rows that it wants to measure ranges on, at most."""

    @abc.abstractmethod
    def __call__(self, graph: Graph, calibration: NDArray[np.float32], family: str, folder: Path) -> None:
        """Writes `model.onnx` for the engine family into the folder.

        Args:
            graph: the float graph.
            calibration: normalised training rows (B, *input_shape).
            family: `Engine.family` of the engine that will run it.

        Raises:
            PassError: the technique can't be placed for this family or this graph.
        """


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One model in the forms that engines and graph passes read.

    Attributes:
        module: folder of the float module artefact (`artefacts.module.rebuild` reads it).
        onnx: file of the graph with a dynamic batch dimension; float, or with quantize/dequantize pairs.
        quantized: whether `onnx` holds quantize/dequantize pairs.
        reference: safetensors file with `inputs` (B, *input_shape) and `outputs` (B, C) of the float module in eager
            mode.
    """

    module: Path
    onnx: Path
    signature: Signature
    quantized: bool
    reference: Path


@dataclass(frozen=True, kw_only=True)
class Target:
    """The hardware that will run the model, and how it will be called.

    Attributes:
        device: `cpu`.
        threads: how many threads one request may use.
        batch_size: rows per request.
        engines: options of the group `engine` that may be tried, in this order.
    """

    device: Literal["cpu"]
    threads: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    engines: tuple[str, ...]


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


Runner = Callable[["NDArray[Any]"], "NDArray[Any]"]
"""Takes normalised rows (B, *input_shape) and gives outputs (B, C)."""


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
        """A callable with these settings, on what `compile` wrote."""

    @abc.abstractmethod
    def integer_share(self, folder: Path) -> float:
        """Share, in [0, 1], of the convolutions and linear layers of the optimised graph that run in integers."""

    @abc.abstractmethod
    def operators(self, folder: Path, inputs: NDArray[np.float32], repeats: int) -> Sequence[OperatorTime]:
        """Where the time of a request goes, by the engine's own profiler, mean over the repeats."""


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
        profile: Profile,
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
        profile: Profile,
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
    def finish(self, result: Result | None, folder: Path, status: str) -> None:
        """Closes the record.

        Args:
            result: None where the run ended before it had one.
            folder: the run's output folder; what is worth keeping of it is kept.
            status: `FINISHED`, `FAILED` or `KILLED`.
        """

    @abc.abstractmethod
    def command(self) -> str | None:
        """What to type to look at the record; None where there is nothing to look at."""
