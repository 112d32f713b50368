"""What the loop knows: evaluations, verdicts, trials and the result of a run. Plain data with a JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

DATA = "data.json"
"""In a run's folder: name, fingerprint, parts and inputs of the rows that it works with."""


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
        value: observed mean difference, baseline minus candidate; candidate minus baseline where lower is better.
        bound: one-sided upper bound of the difference at `confidence`.
        confidence: after the correction for the number of candidates that look at the same rows.
        rows: how many rows were compared.
        relative: `value` and `bound` are shares of the baseline's quality.
        points: scores are 0 or 1, so that a difference is told in percentage points; else in the metric's own unit.
        label: the class that may have lost most, where every class has to hold; None where the mean of all rows has to.
    """

    value: float
    bound: float
    confidence: float
    rows: int
    relative: bool = False
    points: bool = True
    label: int | None = None

    def told(self, value: float) -> str:
        """A difference of this metric in its unit: `1.20 points`, `1.20 % of the baseline`, `0.0123`."""
        if self.relative:
            return f"{100 * value:.2f} % of the baseline"
        return f"{100 * value:.2f} points" if self.points else f"{value:.4g}"

    def subject(self, metric: str) -> str:
        """What may have dropped: `accuracy`, or `recall of class 3` where every class has to hold."""
        return metric if self.label is None else f"{metric} of class {self.label}"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One metric of a candidate on the validation rows.

    Attributes:
        value: mean over the rows, or the one number that the metric gives for all.
        drop: against the baseline; None for the baseline itself.
        max_drop: largest `drop.bound` that is tolerated; None where the metric is only measured.
        points: scores are 0 or 1, so that the value is told in per cent; of a candidate, its drop says the same.
    """

    value: float
    drop: Drop | None
    max_drop: float | None
    higher_is_better: bool
    points: bool = True

    @property
    def holds(self) -> bool:
        """Whether no more is surely lost than is tolerated. What can't be compared with a baseline does not hold."""
        return self.max_drop is None or (self.drop is not None and self.drop.bound <= self.max_drop)

    def told(self, value: float | None = None) -> str:
        """A value of this metric, by default its own: `98.4 %`, or `0.0123` where it is no share."""
        shown = self.value if value is None else value
        return f"{100 * shown:.1f} %" if (self.points if self.drop is None else self.drop.points) else f"{shown:.4g}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality, speed, size and memory of one compiled candidate.

    Attributes:
        metric: name of the first metric of the task.
        quality: its value on the validation rows; None where nothing can judge the outputs.
        drop: of the first metric against the baseline; None for the baseline itself, and where quality is unchecked.
        metrics: name -> every metric of the task, the first one included, in the task's order; empty where quality is
            unchecked.
        latency_ms: `p50`, `p90`, `p99` of one request at the target's batch size.
        throughput: rows per second.
        speedup: `eager` (against the untouched model in eager PyTorch), `engine` (against the untouched model in its
            best engine) and `previous` (against the best candidate before this one), as far as they apply; by the
            statistic of the request times that `Objective.speed` names.
        references_ms: median latency of what `speedup` compares with, each measured in turns with the candidate.
            `latency_ms` is of the session with the first of them; others may have been measured in another.
        starved: share of the timed rounds in which another process had the CPU for part of the time.
        notes: what its stages say of themselves: widths that are simulated, layers that stay float, predicted latency.
        size_bytes: bytes of the deployable files on disk.
        memory_bytes: peak resident set of the process that serves it, and on a GPU the memory that it holds there.
        flops: of one row, 2 per multiply-add.
        integer_share: share of convolutions and linear layers that run in integers; None for a float candidate.
        emulated: its engine emulates the device here: times and memory are those of the emulation, nothing is compared
            by them, and `speedup` is empty.
    """

    metric: str
    quality: float | None
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
    metrics: Mapping[str, Quality] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    emulated: bool = False

    @property
    def unchecked(self) -> bool:
        """Whether no metric constrains it: it may be fast and wrong."""
        return all(quality.max_drop is None for quality in self.metrics.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BOTTLENECKS = ("compute", "memory", "overhead", "capacity", "data", "transfer", "communication")
"""compute: arithmetic; memory: bandwidth; overhead: time that neither explains; capacity: bytes against the limits.
Of a training step also data: waiting for the next batch; transfer: to the device; communication: waiting for what other
processes tell."""

PHASES = ("data", "transfer", "forward", "backward", "optimizer", "other")
"""Parts of a training step, one after the other: waiting for the batch, moving it to the device, forward pass with the
loss, backward pass, update of the weights, and what is between them."""


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

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / max(self.num_bytes, 1)

    @property
    def headroom(self) -> float | None:
        """How many times faster the roofline allows it to be; None where it asks for nothing."""
        return self.milliseconds / self.roof_ms if self.roof_ms > 0 else None

    @property
    def unit(self) -> str:
        """Of `achieved` and `possible`, by what bounds it."""
        return "GFLOP/s" if self.bound == "compute" else "GB/s"

    @property
    def achieved(self) -> float:
        """10^9 operations or bytes per second."""
        return self._rate(self.milliseconds)

    @property
    def possible(self) -> float:
        """The same in the time that the roofline allows."""
        return self._rate(self.roof_ms)

    def _rate(self, milliseconds: float) -> float:
        work = self.flops if self.bound == "compute" else self.num_bytes
        return work / milliseconds / 1e6 if milliseconds > 0 else 0.0


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


class Diagnosis(Protocol):
    """What a planner reads off a profile, of requests or of training steps."""

    @property
    def operators(self) -> tuple[OperatorGroup, ...]: ...
    @property
    def shares(self) -> Mapping[str, float]: ...
    @property
    def bottleneck(self) -> str: ...
    @property
    def evidence(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All calls of one kind by which processes that train together tell one another in a step.

    Attributes:
        kind: as the backend carries it out, such as `all_reduce`; gloo does a reduce_scatter as one.
        calls: in a step.
        num_bytes: of the tensors that one process gives or takes. Of what an all_reduce among N is given, a process
            sends 2 (N - 1) / N (Patarasuk and Yuan 2009).
        milliseconds: in which at least one is on its way, waiting for slower processes included.
        waited_ms: of these, in which the training waits for them; in the others it calculates.
    """

    kind: str
    calls: float
    num_bytes: int
    milliseconds: float
    waited_ms: float

    @property
    def hidden(self) -> float:
        """Share of its time that lies beside calculation."""
        return 1 - self.waited_ms / self.milliseconds if self.milliseconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Where a training step's time goes, and the bottleneck that follows from it.

    Attributes:
        step_ms: mean wall time of a step.
        phases_ms: each of `PHASES` -> mean milliseconds of a step; they add up to `step_ms`.
        shares: bottleneck -> share of the step: data, transfer, compute, memory, overhead (and communication); they add
            up to 1. Where a memory limit is broken also capacity, the share of the bytes that has to go.
        bottleneck: the class that holds the most time, or `capacity` where a memory limit is broken.
        evidence: sentences with the figures that say so.
        operators: of the forward and backward passes and the update, summed over one step.
        collectives: by which processes that train together tell one another.
        waiting_ms: phase -> milliseconds of it in which they are waited for.
    """

    step_ms: float
    phases_ms: Mapping[str, float]
    shares: Mapping[str, float]
    bottleneck: str
    evidence: tuple[str, ...]
    operators: tuple[OperatorGroup, ...] = ()
    collectives: tuple[Collective, ...] = ()
    waiting_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def parts_ms(self) -> dict[str, float]:
        """The phases without what they wait for other processes and, where there are any, that: `communication`."""
        own = {name: time_ms - self.waiting_ms.get(name, 0.0) for name, time_ms in self.phases_ms.items()}
        return own | ({"communication": sum(self.waiting_ms.values())} if self.collectives else {})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LossCurves:
    """Whether a training learns as the baseline does: losses after the same number of rows, seed beside seed.

    Attributes:
        holds: no segment's loss lies above its limit.
        rows: (S,) training rows that were seen at the end of each segment.
        baseline: (S,) mean loss of each segment over the baseline's seeds.
        limit: (S,) what the candidate's mean may reach: the upper end of what another seed of the baseline would give.
        candidate: (S,) mean loss of each segment over the candidate's seeds.
        num_seeds: of the baseline and of the candidate.
        reason: one clause that says by how much it holds or does not.
    """

    holds: bool
    rows: tuple[int, ...]
    baseline: tuple[float, ...]
    limit: tuple[float, ...]
    candidate: tuple[float, ...]
    num_seeds: tuple[int, int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluation:
    """Speed and loss of one recipe's training.

    Attributes:
        samples_per_second: training rows of its steps, once it is under way.
        step_ms: median wall time of a step.
        batch_size: rows of a step.
        speedup: samples per second against those of `plain` (the baseline) and `previous` (the best before this one),
            measured in turns.
        references: samples per second of the same, as they were measured beside it.
        memory_bytes: peak anonymous memory of the training process and its workers; mapped files are not counted.
        start_seconds: from the start of the process to its first finished step: loading, compiling.
        loss: against the baseline; None for the baseline itself, and where it is not worth a comparison.
        notes: what the training says of itself, such as where its rows are cached.
    """

    samples_per_second: Interval
    step_ms: Interval
    batch_size: int
    speedup: Mapping[str, Interval]
    references: Mapping[str, Interval]
    memory_bytes: int
    start_seconds: float
    loss: LossCurves | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A declared move of the loop, as its YAML spells it.

    Attributes:
        addresses: bottleneck -> factor by which the move is expected to shorten the time (or bytes) of that class.
        attempts: alternatives; each is a list of overrides that edit the parent recipe.
        search: `{key, low, high, tolerance}` of a parameter whose largest admissible value is searched by bisection;
            `{halving: {space, rungs, keep}}` of choices that are searched together, cheaply first
            (`core.search.Halving`); or None.
        cost: expected seconds of one attempt where nothing has been measured yet.
        outputs: what the task's outputs have to be (`Task.outputs`) for the move to make sense; None for any.
        operators: kinds (`OperatorTime.kind`) of the operators whose time it shortens; None for all.
        by_default: False for a move that is made only where the user names it (`strategy=[engine,joint]`).
        speeds: what becomes faster: `requests` to the model, or its `training`.
    """

    name: str
    description: str
    addresses: Mapping[str, float]
    attempts: tuple[tuple[str, ...], ...]
    search: Mapping[str, Any] | None
    cost: float
    outputs: str | None = None
    operators: tuple[str, ...] | None = None
    by_default: bool = True
    speeds: str = "requests"


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
        holds: whether it was measured and every constraint held, also where it was rejected for not being better.
        seconds: recorded cost of everything the trial needed and no trial before it, also of what came from the store.
        spent: wall seconds this process really took.
        stages: stage name -> store key.
        rebuild: the command line that builds and measures the recipe again.
        choices: what matters of the recipe, whether or not it was said: group -> option, and knobs by their key.
        training: in place of `evaluation` where training is what is made faster.
        step_profile: in place of `profile`, likewise.
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
    choices: Mapping[str, str] = field(default_factory=dict)
    training: TrainingEvaluation | None = None
    step_profile: StepProfile | None = None

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Whichever profile there is."""
        return self.profile or self.step_profile

    @property
    def speedup(self) -> Mapping[str, Interval]:
        """Of whichever evaluation there is; empty where there is none."""
        measured = self.evaluation or self.training
        return measured.speedup if measured else {}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One read of the untouched test rows: the chosen candidate against the baseline.

    Attributes:
        held: whether the bound of every metric that has a margin lies inside it (and the baseline is better than
            chance).
        metric: the first that is constrained; the figures that follow are its own.
        reads: how many different artefacts have been certified on these rows so far, this one included; above 1 the
            rows are no longer untouched.
        statement: one sentence that claims no more than this.
        metrics: name -> every metric of the candidate on the test rows, with what it may have lost.
        baselines: name -> the baseline's value of each.
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
    metrics: Mapping[str, Quality] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def unchecked(cls, statement: str) -> Certificate:
        """Where nothing can judge the outputs: not held, no rows, and no figure is a number."""
        unknown = float("nan")
        return cls(
            held=False,
            metric="quality",
            baseline=unknown,
            candidate=unknown,
            drop=unknown,
            margin=unknown,
            bound=unknown,
            confidence=unknown,
            rows=0,
            reads=0,
            statement=statement,
        )

    @property
    def checked(self) -> bool:
        """Whether any metric has a margin, so that there was something to hold."""
        return any(quality.max_drop is not None for quality in self.metrics.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a figure that is not known is None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


class Share(NamedTuple):
    """What one of the steps that led to the best gave: the factor in what is optimised against the step before."""

    step: Trial
    gain: float


@dataclass(frozen=True, kw_only=True)
class RequestLatency:
    """What the best candidate takes for another request than the one that decided.

    Attributes:
        length: of its dynamic axes; None for that of the rows as the data have them.
        latency_ms: `p50`, `p90` and `p99`.
        throughput: rows per second.
        speedup: against `eager` and `engine`, as `Evaluation.speedup`.
        references_ms: median latency of both for the same request.
    """

    batch_size: int
    length: int | None
    latency_ms: Mapping[str, Interval]
    throughput: Interval
    speedup: Mapping[str, Interval]
    references_ms: Mapping[str, Interval]

    @property
    def name(self) -> str:
        """`b32`, or `b1_l16` where it has a length of its own."""
        return f"b{self.batch_size}" + (f"_l{self.length}" if self.length is not None else "")

    @property
    def told(self) -> str:
        """`32 rows`, `1 row of length 16`."""
        rows = f"{self.batch_size} row{'' if self.batch_size == 1 else 's'}"
        return rows + (f" of length {self.length}" if self.length is not None else "")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ends with; `summary.json` is this as JSON.

    Attributes:
        speedup: of the best against `eager`, `engine` and `previous`, as `Evaluation.speedup`.
        size_ratio: bytes of the baseline's files over the best one's.
        front: numbers of the trials that no other beats in what is optimised and in quality at once.
        optimize: `objective.optimize` of the run.
        requests: what the best takes for the other requests that the target names (`target.also`).
    """

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
    optimize: str = "p50"
    requests: tuple[RequestLatency, ...] = ()

    @property
    def lineage(self) -> tuple[Trial, ...]:
        """As of the function `lineage`."""
        return lineage(self.trials, self.best)

    @property
    def shares(self) -> tuple[Share, ...]:
        """As of `shares_of`."""
        return shares_of(self.trials, self.best)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ends with that makes training faster; `summary.json` is this as JSON.

    Attributes:
        speedup: samples per second of the best against `plain`, the baseline, and `previous`.
        command: that trains, compresses and measures the model with the best recipe.
    """

    experiment: str
    baseline: Trial
    best: Trial
    trials: tuple[Trial, ...]
    speedup: Mapping[str, Interval]
    stopped: str
    binding: str | None
    command: str
    seconds: float
    spent: float
    machine: Mapping[str, Any]
    tracking_command: str | None
    warnings: tuple[str, ...] = ()

    @property
    def shares(self) -> tuple[Share, ...]:
        """As of `shares_of`."""
        return shares_of(self.trials, self.best)


def lineage(trials: Sequence[Trial], best: Trial) -> tuple[Trial, ...]:
    """The trials whose recipes were edited one after the other, from the baseline to the best."""
    by_number = {trial.number: trial for trial in trials}
    line = [best]
    while (parent := line[-1].parent) is not None and parent in by_number:
        line.append(by_number[parent])
    return tuple(reversed(line))


def shares_of(trials: Sequence[Trial], best: Trial) -> tuple[Share, ...]:
    """What each step from the baseline to the best gave; their product is the gain of them all.

    A trial's own measured gain is against the best of its time. Where that was another edit of the same recipe, whose
    place it took, the gain of that one belongs to it.
    """
    steps = [trial for trial in lineage(trials, best) if trial.verdict == "accepted" or trial.number == best.number]
    return tuple(Share(step, math.prod(_gains(trials, before.number, step.number))) for before, step in pairwise(steps))


def _gains(trials: Sequence[Trial], before: int, number: int) -> list[float]:
    """Of what was accepted after one trial and before another, and that other's own."""
    since = [it for it in trials if before < it.number < number and it.verdict == "accepted"]
    own = [it for it in trials if it.number == number]
    return [trial.measured_gain for trial in (*since, *own) if trial.measured_gain is not None]
