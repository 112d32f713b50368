"""What the loop knows: evaluations, verdicts, trials and the result of a run. Plain data with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Loss of quality of a candidate against the baseline on the same rows; positive is worse.

    Attributes:
        value: observed mean difference, baseline minus candidate.
        bound: one-sided upper bound of the difference at `confidence`.
        confidence: after the correction for the number of candidates that look at the same rows.
        rows: how many rows were compared.
    """

    value: float
    bound: float
    confidence: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality, speed, size and memory of one compiled candidate.

    Attributes:
        quality: mean of the metric on the validation rows.
        drop: against the baseline; None for the baseline itself.
        latency_ms: `p50`, `p90`, `p99` of one request at the target's batch size.
        throughput: rows per second.
        speedup: `eager` (against the untouched model in eager PyTorch), `engine` (against the untouched model in its
            best engine) and `previous` (against the best candidate before this one), as far as they apply.
        references_ms: median latency of what `speedup` compares with, each measured in turns with the candidate.
            `latency_ms` is of the session with the first of them; others may have been measured in another.
        starved: share of the timed rounds in which another process had the CPU for part of the time.
        size_bytes: bytes of the deployable files on disk.
        memory_bytes: peak resident set of the process that serves it.
        flops: of one row, 2 per multiply-add.
        integer_share: share of convolutions and linear layers that run in integers; None for a float candidate.
    """

    metric: str
    quality: float
    drop: Drop | None
    latency_ms: Mapping[str, Interval]
    throughput: Interval
    speedup: Mapping[str, Interval]
    references_ms: Mapping[str, Interval]
    size_bytes: int
    memory_bytes: int
    flops: int
    num_parameters: int
    integer_share: float | None = None
    starved: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BOTTLENECKS = ("compute", "memory", "overhead", "capacity")
"""compute: arithmetic; memory: bandwidth; overhead: time that neither explains; capacity: bytes against the limits."""


@dataclass(frozen=True, kw_only=True)
class OperatorGroup:
    """All operators of one kind within one request, placed on the roofline.

    Attributes:
        bound: `compute` or `memory`: which roof lies lower at this intensity.
        roof_ms: the time that the roofline allows, max(flops / peak, bytes / bandwidth).
    """

    kind: str
    calls: int
    milliseconds: float
    share: float
    flops: int
    num_bytes: int
    bound: str
    roof_ms: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where one request's time goes on the target, and the bottleneck that follows from it.

    Attributes:
        shares: bottleneck -> share of the latency; compute + memory + overhead = 1.
        bottleneck: the class that holds the most time, or `capacity` where a size limit is broken.
        evidence: sentences with the figures that say so.
    """

    latency_ms: float
    operators: tuple[OperatorGroup, ...]
    shares: Mapping[str, float]
    bottleneck: str
    evidence: tuple[str, ...]
    weight_bytes: int
    roofline: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A declared move of the loop, as its YAML spells it.

    Attributes:
        addresses: bottleneck -> factor by which the move is expected to shorten the time (or bytes) of that class.
        attempts: alternatives; each is a list of overrides that edit the parent recipe.
        search: `{key, low, high, tolerance}` of a parameter whose largest admissible value is searched by bisection; or
            None.
        cost: expected seconds of one attempt where nothing has been measured yet.
    """

    name: str
    description: str
    addresses: Mapping[str, float]
    attempts: tuple[tuple[str, ...], ...]
    search: Mapping[str, Any] | None
    cost: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be tried next.

    Attributes:
        parent: number of the trial whose recipe is edited. That is not always the best one: the alternatives of a
            strategy all edit the recipe that the first of them edited.
        expected_gain: speed-up against the parent; None where nothing declares one.
    """

    strategy: str
    parent: int
    edit: tuple[str, ...]
    expected_gain: float | None
    why: str


Verdict = Literal["accepted", "rejected", "failed"]


class Estimate(NamedTuple):
    """What working off one strategy may cost at most."""

    strategy: str
    attempts: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One iteration of the loop.

    Attributes:
        number: 0 for the baseline.
        parent: number of the trial whose recipe was edited.
        overrides: the normalised recipe.
        expected_gain: predicted speed-up against the parent.
        measured_gain: speed-up against the best before, `speedup["previous"].value`.
        holds: whether it was measured and every constraint held, also where it was rejected for not being faster.
        seconds: recorded cost of everything the trial needed, also of what came from the store.
        spent: wall seconds this process really took.
        stages: stage name -> store key.
        rebuild: the command line that builds and measures the recipe again.
    """

    number: int
    parent: int | None
    overrides: tuple[str, ...]
    edit: tuple[str, ...]
    strategy: str
    bottleneck: str
    verdict: Verdict
    reason: str
    expected_gain: float | None = None
    measured_gain: float | None = None
    holds: bool = False
    evaluation: Evaluation | None = None
    profile: Profile | None = None
    seconds: float = 0.0
    spent: float = 0.0
    stages: Mapping[str, str] = field(default_factory=dict)
    rebuild: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One read of the untouched test rows: the chosen candidate against the baseline.

    Attributes:
        held: whether the bound lies inside the margin (and the baseline is better than chance).
        reads: how many different artefacts have been certified on these rows so far, this one included; above 1 the
            rows are no longer untouched.
        statement: one sentence that claims no more than this.
    """

    held: bool
    metric: str
    baseline: float
    candidate: float
    drop: float
    margin: float
    bound: float
    confidence: float
    rows: int
    reads: int
    statement: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ends with; `summary.json` is this as JSON."""

    experiment: str
    baseline: Trial
    best: Trial
    trials: tuple[Trial, ...]
    speedup: Mapping[str, Interval]
    size_ratio: float
    certificate: Certificate
    front: tuple[int, ...]
    stopped: str
    binding: str | None
    engine_reference: str
    seconds: float
    spent: float
    machine: Mapping[str, Any]
    model_folder: str
    tracking_command: str | None
    warnings: tuple[str, ...] = ()
