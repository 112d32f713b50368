"""How many rows per second trainings take, and how many times more than others: in turns, in processes of their own.

Every participant is one training that goes on for as long as it is asked for steps, and stands still while another has
its turn. The blocks are kept as they were measured, so that a stored measurement replays identically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from math import ceil, sqrt
from time import monotonic, sleep
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Interval

from hasten.core.errors import EngineError
from hasten.core.memory import anonymous_bytes
from hasten.core.trial import Interval as Estimate
from hasten.evidence.bounds import bootstrap_ratio, percentile_interval, rate_interval, widened
from hasten.evidence.latency import CANDIDATE, measuring_alone
from hasten.evidence.process import Process

START_SECONDS = 900.0
"""That loading the rows, compiling and the first step may take."""
BLOCK_SECONDS = 600.0
"""That a block of steps may take."""
DEATH_SECONDS = 2.0
"""From when a process that was killed closes its connections until it is known to be dead."""

Spec = Mapping[str, Any]
"""What a training process is told, JSON-able: which training it is."""


@dataclass(frozen=True, kw_only=True)
class PaceProtocol:
    """How long to measure.

    Attributes:
        block_seconds: length of a block; it decides the number of steps in it, the same in every round.
        min_steps: least steps in a block.
        warm_up_steps: before the first round: compilers and allocators get to know the shapes.
        pause_seconds: after a block, so that its loader's workers fill their queues before another's turn.
        min_rounds: rounds before the intervals are looked at.
        max_rounds: rounds after which the intervals are taken as they are.
        max_seconds: of rounds after which the intervals are taken as they are (`min_rounds` are always made).
        precision: half-width of a ratio's interval, relative to its value, at which it is narrow enough.
        confidence: of the intervals that decide when to stop, two-sided.
        launch_sd: relative standard deviation of the pace between launches of one and the same training, as of
            `evidence.latency.LatencyProtocol`.
    """

    block_seconds: Annotated[float, Gt(0)] = 0.6
    min_steps: Annotated[int, Ge(1)] = 4
    warm_up_steps: Annotated[int, Ge(1)] = 6
    pause_seconds: Annotated[float, Ge(0)] = 0.1
    min_rounds: Annotated[int, Ge(2)] = 6
    max_rounds: Annotated[int, Ge(2)] = 12
    max_seconds: Annotated[float, Gt(0)] = 60.0
    precision: Annotated[float, Gt(0)] = 0.02
    confidence: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    launch_sd: Annotated[float, Interval(ge=0, lt=1)] = 0.01


class Companions(NamedTuple):
    """The other processes of a training in several.

    Attributes:
        environment: variables by which the first process meets them.
        pids: of those on this machine.
        told: what became of one that has died, one clause; empty where all live.
    """

    environment: Mapping[str, str]
    pids: Sequence[int]
    told: Callable[[], str]


def alone() -> AbstractContextManager[Companions]:
    """Of a training in one process."""
    return nullcontext(Companions({}, (), str))


class Training(NamedTuple):
    """One that takes part.

    Attributes:
        module: that its process runs, and that answers as `stages.trainee`.
        spec: what the process is told.
        threads: that it calculates with.
        settle: steps at the start of a block that are not counted: as many as its loader had the time to prepare while
            others had their turn.
        arguments: of the module's command line.
        companions: starts the processes that train with it, for the length of a `with` block.
    """

    module: str
    spec: Spec
    threads: int
    settle: int = 1
    arguments: Sequence[str] = ()
    companions: Callable[[], AbstractContextManager[Companions]] = alone


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Raw blocks of a candidate and its references.

    Attributes:
        blocks_ms: participant (`candidate` and the references' names) -> milliseconds of each step, one block a round.
        batch_sizes: participant -> rows of a step.
        memory_bytes: participant -> most anonymous memory of its processes, as seen after each block.
        start_seconds: participant -> from the start of the process to its first finished step.
        notes: participant -> what the training said of itself.
        seed: of the order within the rounds and of every bootstrap.
    """

    blocks_ms: Mapping[str, tuple[tuple[float, ...], ...]]
    batch_sizes: Mapping[str, int]
    memory_bytes: Mapping[str, int]
    start_seconds: Mapping[str, float]
    protocol: PaceProtocol
    seed: int
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pace:
        return cls(
            **{
                **values,
                "blocks_ms": {name: tuple(map(tuple, blocks)) for name, blocks in values["blocks_ms"].items()},
                "protocol": PaceProtocol(**values["protocol"]),
                "notes": {name: tuple(notes) for name, notes in values["notes"].items()},
            }
        )

    def pair(self, reference: str | None, name: str) -> Pace:
        """The candidate alone, or with one of its references under another name."""
        names = {CANDIDATE: CANDIDATE, **({name: reference} if reference else {})}
        kept = {
            key: {new: getattr(self, key)[old] for new, old in names.items()}
            for key in ("blocks_ms", "batch_sizes", "memory_bytes", "start_seconds", "notes")
        }
        return Pace(**kept, protocol=self.protocol, seed=self.seed)


def samples_per_second(pace: Pace, confidence: float, participant: str = CANDIDATE) -> Estimate:
    """Rows of the steps over the time that they took."""
    steps = widened(
        rate_interval(pace.blocks_ms[participant], confidence, pace.seed), pace.protocol.launch_sd, confidence
    )
    return _scaled(steps, 1e3 * pace.batch_sizes[participant])


def step_ms(pace: Pace, confidence: float, participant: str = CANDIDATE) -> Estimate:
    """Median wall time of a step."""
    median = percentile_interval(pace.blocks_ms[participant], 50.0, confidence, pace.seed)
    return widened(median, pace.protocol.launch_sd, confidence)


def speedups(pace: Pace, confidence: float) -> dict[str, Estimate]:
    """Name of each reference -> how many times more rows per second the candidate takes."""
    return {
        name: widened(_ratio(pace, name, confidence), sqrt(2) * pace.protocol.launch_sd, confidence)
        for name in pace.blocks_ms
        if name != CANDIDATE
    }


def measure(
    trainings: Mapping[str, Training],
    protocol: PaceProtocol,
    seed: int,
    *,
    on_round: Callable[[], None] = lambda: None,
) -> Pace:
    """Measures a candidate's training beside its references', alone on this machine as far as hasten is concerned.

    Args:
        trainings: by participant, `candidate` among them.
        on_round: told after every round, of which there are `protocol.max_rounds` at most.

    Raises:
        EngineError: a training raised, crashed or hung.
    """
    assert CANDIDATE in trainings
    with ExitStack() as stack:
        stack.enter_context(measuring_alone())
        trainees = {name: stack.enter_context(Trainee.of(training)) for name, training in trainings.items()}
        begun = {name: trainee.begin(trainings[name].spec) for name, trainee in trainees.items()}
        settle = {name: training.settle for name, training in trainings.items()}
        rounds = _Rounds(trainees=trainees, settle=settle, protocol=protocol, seed=seed)
        rounds.go(on_round, {name: each["batch_size"] for name, each in begun.items()})
        return rounds.pace(begun)


def soon(told: Callable[[], str]) -> str:
    """What is told within `DEATH_SECONDS`; empty where nothing is."""
    deadline = monotonic() + DEATH_SECONDS
    while not (found := told()) and monotonic() < deadline:
        sleep(0.05)
    return found


class Trainee:
    """A training in a process of its own, for the length of a `with` block; raises EngineError as `Process.ask`.

    Args:
        module, threads, arguments, companions: as of `Training`.

    Attributes:
        companions: that train with it, once it is entered.
        memory_bytes: the most that all its processes on this machine took, as seen after its steps.
    """

    def __init__(
        self,
        module: str,
        threads: int,
        arguments: Sequence[str] = (),
        companions: Callable[[], AbstractContextManager[Companions]] = alone,
    ) -> None:
        self._module, self._threads, self._arguments, self._start = module, threads, arguments, companions
        self.memory_bytes = 0

    @classmethod
    def of(cls, training: Training) -> Trainee:
        return cls(training.module, training.threads, training.arguments, training.companions)

    def __enter__(self) -> Trainee:
        self._started = monotonic()
        with ExitStack() as stack:
            self.companions = stack.enter_context(self._start())
            self.process = stack.enter_context(
                Process(
                    self._module,
                    threads=self._threads,
                    arguments=self._arguments,
                    environment=self.companions.environment,
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self, spec: Spec) -> dict[str, Any]:
        """Starts the training; `batch_size`, `start_seconds` and `notes` once its first step is done."""
        answer = self._ask("begin", spec=spec)
        return {**answer, "start_seconds": monotonic() - self._started}

    def steps(self, number: int) -> list[float]:
        """Milliseconds of each of the next steps."""
        answer: list[float] = self._ask("steps", number=number)
        pids = (self.process.pid, *self.companions.pids)
        self.memory_bytes = max(self.memory_bytes, sum(map(anonymous_bytes, pids)))
        return answer

    def profile(self, spec: Spec, *, warm_up: int, steps: int) -> dict[str, Any]:
        """`phases_ms`, `page_faults` and `delays_ms` of so many undisturbed steps after a few others, and `figures` of
        operators."""
        answer: dict[str, Any] = self._ask("profile", spec=spec, warm_up=warm_up, steps=steps)
        return answer

    def losses(self, spec: Spec) -> dict[str, Any]:
        """`losses` of each step of a training from its start to its end, and `batch_size`."""
        answer: dict[str, Any] = self._ask("losses", spec=spec)
        return answer

    def _ask(self, what: str, **arguments: Any) -> Any:
        timeout = START_SECONDS if what in ("begin", "losses", "profile") else BLOCK_SECONDS
        try:
            return self.process.ask(what, arguments, timeout=timeout, knob="a training step that hangs", pause=0.5)
        except EngineError as error:
            # Where another has died, what the first process says of that is that nobody answers: it may say so before
            # the system has put an end to the other.
            if self.companions.environment and (told := soon(self.companions.told)):
                raise EngineError(f"{error}; {told}") from error
            raise


@dataclass(kw_only=True)
class _Rounds:
    """One block of every participant a round, in a random order."""

    trainees: Mapping[str, Trainee]
    settle: Mapping[str, int]
    protocol: PaceProtocol
    seed: int
    blocks_ms: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def go(self, on_round: Callable[[], None], batch_sizes: Mapping[str, int]) -> None:
        protocol, rng = self.protocol, np.random.default_rng(self.seed)
        self.batch_sizes = dict(batch_sizes)
        steps = {name: self._steps_per_block(trainee) for name, trainee in self.trainees.items()}
        start = monotonic()
        for made in range(1, protocol.max_rounds + 1):
            for name in map(str, rng.permutation(list(self.trainees))):
                times = self.trainees[name].steps(self.settle[name] + steps[name])[self.settle[name] :]
                self.blocks_ms[name] = (*self.blocks_ms.get(name, ()), tuple(np.round(times, 4).tolist()))
                sleep(protocol.pause_seconds)
            on_round()
            late = monotonic() - start > protocol.max_seconds
            if made >= protocol.min_rounds and (late or self._is_settled()):
                return

    def pace(self, begun: Mapping[str, Mapping[str, Any]]) -> Pace:
        return Pace(
            blocks_ms=self.blocks_ms,
            batch_sizes=self.batch_sizes,
            memory_bytes={name: trainee.memory_bytes for name, trainee in self.trainees.items()},
            start_seconds={name: round(each["start_seconds"], 3) for name, each in begun.items()},
            notes={name: tuple(each["notes"]) for name, each in begun.items()},
            protocol=self.protocol,
            seed=self.seed,
        )

    def _steps_per_block(self, trainee: Trainee) -> int:
        times = trainee.steps(self.protocol.warm_up_steps)
        return max(self.protocol.min_steps, ceil(1e3 * self.protocol.block_seconds / float(np.median(times[-3:]))))

    def _is_settled(self) -> bool:
        reached = Pace(
            blocks_ms=self.blocks_ms,
            batch_sizes=self.batch_sizes,
            memory_bytes={},
            start_seconds={},
            protocol=self.protocol,
            seed=self.seed,
        )
        names = [name for name in self.blocks_ms if name != CANDIDATE]
        ratios = [_ratio(reached, name, self.protocol.confidence) for name in names]
        ratios = ratios or [rate_interval(self.blocks_ms[CANDIDATE], self.protocol.confidence, self.seed)]
        return all(each.high - each.low <= 2 * self.protocol.precision * each.value for each in ratios)


def _ratio(pace: Pace, reference: str, confidence: float) -> Estimate:
    """Of rows per second: that of the mean times of a step, times that of the rows in it."""
    times = bootstrap_ratio(pace.blocks_ms[reference], pace.blocks_ms[CANDIDATE], confidence, pace.seed, None)
    return _scaled(times, pace.batch_sizes[CANDIDATE] / pace.batch_sizes[reference])


def _scaled(interval: Estimate, factor: float) -> Estimate:
    return Estimate(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)
