"""How fast a compiled candidate is, and how much faster than others: interleaved, in processes of their own.

Every participant is served by a worker of its own, all on the same CPUs, and they run in rounds: one block of calls
each, in a random order. What slows the machine down for a while slows all of them, and the ratio within a round stays.
The blocks are kept as they were measured: latencies, throughput and speed-ups are functions of them, so that a stored
measurement replays identically.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Interval
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hasten.core.interfaces import Target
from hasten.core.processor import siblings, usable_cpus
from hasten.core.trial import Interval as Estimate
from hasten.evidence.bounds import bootstrap_ratio, percentile_interval, rate_interval, widened
from hasten.evidence.process import Timing, Worker, serving_environment
from hasten.evidence.worker import write_inputs

log = logging.getLogger(__name__)

CANDIDATE = "candidate"
GPU_WARM_UP_SECONDS = 2.0
"""Of calls before the first round on a GPU, at least. Idle, it clocks down to save power, and it takes longer than a
processor to clock up again and to find its temperature; in the rounds one participant or another keeps it busy."""
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}

Blocks = tuple[tuple[float, ...], ...]
"""Microseconds of each call, one block a round."""


@dataclass(frozen=True, kw_only=True)
class LatencyProtocol:
    """How long to measure.

    Attributes:
        block_ms: length of a block in milliseconds; it decides the number of calls in it, the same in every round.
        min_calls: least calls in a block, where one call is longer than the block.
        max_calls: most calls in a block.
        settle_calls: calls at the start of a block that are not counted: the others have emptied the caches.
        warm_up_seconds: of calls before the first round.
        min_rounds: rounds before the intervals are looked at.
        max_rounds: rounds after which the intervals are taken as they are.
        max_seconds: of rounds after which the intervals are taken as they are (`min_rounds` are always made).
        precision: half-width of an interval, relative to its value, at which it is narrow enough.
        confidence: of the intervals that decide when to stop, two-sided.
        max_starved: share of a block in which a participant may be ready to run while another process has the CPU. A
            round with more is made again: it lengthens long requests and not short ones, so the ratio would flatter.
        launch_sd: relative standard deviation of the latency between launches of one and the same artefact, which
            depends on where its memory happens to lie. Blocks of one launch don't show it, so every reported interval
            is widened by it. A small CNN over five launches: ONNX Runtime 0.004, eager 0.005, OpenVINO 0.008 on a quiet
            machine, up to 0.014 on a busy one.
    """

    block_ms: Annotated[float, Gt(0)] = 15.0
    min_calls: Annotated[int, Ge(1)] = 3
    max_calls: Annotated[int, Ge(1)] = 200
    settle_calls: Annotated[int, Ge(0)] = 2
    warm_up_seconds: Annotated[float, Ge(0)] = 0.1
    min_rounds: Annotated[int, Ge(2)] = 15
    max_rounds: Annotated[int, Ge(2)] = 60
    max_seconds: Annotated[float, Gt(0)] = 60.0
    precision: Annotated[float, Gt(0)] = 0.02
    confidence: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    max_starved: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    launch_sd: Annotated[float, Interval(ge=0, lt=1)] = 0.012


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Raw blocks of a candidate and its references.

    Attributes:
        blocks_us: participant (`candidate` and the references' names) -> its blocks, the same rounds for all.
        memory_bytes: participant -> peak resident set of the process that served it, with its share of a GPU's memory.
        batch_size: rows of one call.
        cpus: that all participants ran on.
        environment: variables that every process was given.
        seed: of the order within the rounds and of every bootstrap.
        num_starved: rounds that were kept although another process had the CPU for part of them, because the machine
            never became quiet.
        stream: participants that work on several requests at once had as many as they take, and `blocks_us` are the
            times from one output to the next: good for means, and no latency.
    """

    blocks_us: Mapping[str, Blocks]
    memory_bytes: Mapping[str, int]
    batch_size: int
    cpus: tuple[int, ...]
    environment: Mapping[str, str]
    protocol: LatencyProtocol
    seed: int
    num_starved: int = 0
    stream: bool = False

    @property
    def num_rounds(self) -> int:
        return len(self.blocks_us[CANDIDATE])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        blocks_us = {name: tuple(map(tuple, blocks)) for name, blocks in values["blocks_us"].items()}
        protocol = LatencyProtocol(**values["protocol"])
        return cls(**{**values, "blocks_us": blocks_us, "cpus": tuple(values["cpus"]), "protocol": protocol})


def latency_ms(measurement: Measurement, confidence: float, participant: str = CANDIDATE) -> dict[str, Estimate]:
    """`p50`, `p90` and `p99` of one request in milliseconds."""
    blocks = measurement.blocks_us[participant]
    sd = measurement.protocol.launch_sd
    intervals = {name: percentile_interval(blocks, q, confidence, measurement.seed) for name, q in PERCENTILES.items()}
    return {name: _scaled(widened(interval, sd, confidence), 1e-3) for name, interval in intervals.items()}


def throughput(measurement: Measurement, confidence: float, participant: str = CANDIDATE) -> Estimate:
    """Rows per second of one process that serves one request after the other."""
    calls_per_us = rate_interval(measurement.blocks_us[participant], confidence, measurement.seed)
    return _scaled(widened(calls_per_us, measurement.protocol.launch_sd, confidence), 1e6 * measurement.batch_size)


def speedups(measurement: Measurement, confidence: float, statistic: str = "p50") -> dict[str, Estimate]:
    """Name of each reference -> how many times faster than it the candidate is.

    Args:
        statistic: of the requests' times: `p50`, `p90`, `p99`, or `mean`, whose ratio is that of the throughputs.
    """
    candidate = measurement.blocks_us[CANDIDATE]
    q = None if statistic == "mean" else PERCENTILES[statistic]
    ratios = {
        name: bootstrap_ratio(blocks, candidate, confidence, measurement.seed, q)
        for name, blocks in measurement.blocks_us.items()
        if name != CANDIDATE
    }
    sd_of_both = sqrt(2) * measurement.protocol.launch_sd
    return {name: widened(ratio, sd_of_both, confidence) for name, ratio in ratios.items()}


def is_settled(blocks_us: Mapping[str, Blocks], protocol: LatencyProtocol, seed: int, q: float | None = 50.0) -> bool:
    """Whether every speed-up, or without references the median latency, is known as precisely as the protocol asks.

    As far as more rounds can tell, that is, without the variation between launches.

    Args:
        q: percentile of the requests' times that the speed-ups are of; None for the mean.
    """
    candidate = blocks_us[CANDIDATE]
    references = [blocks for name, blocks in blocks_us.items() if name != CANDIDATE]
    intervals = [bootstrap_ratio(blocks, candidate, protocol.confidence, seed, q) for blocks in references]
    if not intervals and q is None:
        intervals = [rate_interval(candidate, protocol.confidence, seed)]
    intervals = intervals or [percentile_interval(candidate, PERCENTILES["p50"], protocol.confidence, seed)]
    return all(interval.high - interval.low <= 2 * protocol.precision * interval.value for interval in intervals)


def measure(
    candidate: Path,
    references: Mapping[str, Path],
    target: Target,
    inputs: Sequence[NDArray[Any]],
    protocol: LatencyProtocol,
    seed: int,
    *,
    stream: bool = False,
    on_round: Callable[[], None] = lambda: None,
) -> Measurement:
    """Measures a compiled candidate beside its references, alone on this machine as far as hasten is concerned.

    Args:
        candidate: compiled folder (with `engine.json`).
        references: name -> compiled folder, for example `eager`, `engine` and `previous`.
        inputs: at least one row (N, *shape) of each input, repeated or cut to the target's batch size.
        stream: give participants that work on several requests at once as many, as for their throughput.
        on_round: told after every round, of which there are `protocol.max_rounds` at most.

    Raises:
        EngineError: an engine raised, crashed or hung, naming its folder.
    """
    assert CANDIDATE not in references
    if target.device == "gpu":
        protocol = replace(protocol, warm_up_seconds=max(protocol.warm_up_seconds, GPU_WARM_UP_SECONDS))
    folders = {CANDIDATE: candidate, **references}
    with ExitStack() as stack:
        request = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hasten-"))) / "request.npz"
        write_inputs(request, (values[np.arange(target.batch_size) % len(values)] for values in inputs))
        stack.enter_context(measuring_alone())
        pool = stack.enter_context(ThreadPoolExecutor(len(folders)))
        cpus = measuring_cpus(target.threads)
        workers = {name: stack.enter_context(Worker.of(target, cpus)) for name in folders}
        list(pool.map(lambda name: workers[name].load(folders[name]), folders))
        blocks_us, num_starved = _rounds(workers, request, protocol, seed, stream, on_round)
        return Measurement(
            blocks_us=blocks_us,
            memory_bytes={name: worker.memory() for name, worker in workers.items()},
            batch_size=target.batch_size,
            cpus=tuple(sorted(cpus)),
            environment=serving_environment(target.threads),
            protocol=protocol,
            seed=seed,
            num_starved=num_starved,
            stream=stream,
        )


@contextmanager
def measuring_alone(lock_file: Path | None = None) -> Iterator[None]:
    """Holds the lock without which no process of this machine measures.

    Args:
        lock_file: shared by all users of the machine; None for `hasten-measuring.lock` in the temporary folder.
    """
    lock = FileLock(lock_file or Path(tempfile.gettempdir()) / "hasten-measuring.lock", mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another measurement on this machine (%s)", lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def measuring_cpus(threads: int) -> frozenset[int]:
    """The CPUs that participants are confined to: one a thread, on different cores; all where there are too few.

    On the same CPUs they meet the same competition from other processes. Left to the scheduler, one participant may
    share its core for seconds while another has its own: between identical models that made differences of 5 to 10 %.
    The last ones, because the first serve most interrupts.
    """
    allowed = usable_cpus()
    first_of_each_core = sorted({min(siblings(cpu) & allowed) for cpu in allowed})
    return frozenset(first_of_each_core[-threads:] if threads <= len(first_of_each_core) else allowed)


def _rounds(
    workers: Mapping[str, Worker],
    request: Path,
    protocol: LatencyProtocol,
    seed: int,
    stream: bool,
    on_round: Callable[[], None],
) -> tuple[dict[str, Blocks], int]:
    """Blocks of every participant, and how many rounds among them were starved: as many are made again as count."""
    rng = np.random.default_rng(seed)
    calls = {name: _calls_per_block(worker, request, protocol) for name, worker in workers.items()}
    blocks_us: dict[str, Blocks] = dict.fromkeys(workers, ())
    again, num_starved = protocol.max_rounds, 0
    start = monotonic()
    while len(blocks_us[CANDIDATE]) < protocol.max_rounds:
        timings = {
            name: workers[name].time(request, settle=protocol.settle_calls, calls=calls[name], stream=stream)
            for name in map(str, rng.permutation(list(workers)))
        }
        late = monotonic() - start > protocol.max_seconds
        starved = any(_is_starved(timing, protocol) for timing in timings.values())
        if starved and again > 0 and not late:
            again -= 1
            continue
        num_starved += starved
        for name, timing in timings.items():
            blocks_us[name] += (tuple((timing.seconds * 1e6).round(2).tolist()),)
        on_round()
        enough = len(blocks_us[CANDIDATE]) >= protocol.min_rounds
        if enough and (late or is_settled(blocks_us, protocol, seed, None if stream else 50.0)):
            break
    return blocks_us, num_starved


def _is_starved(timing: Timing, protocol: LatencyProtocol) -> bool:
    return timing.starved_seconds > protocol.max_starved * float(timing.seconds.sum())


def _calls_per_block(worker: Worker, request: Path, protocol: LatencyProtocol) -> int:
    seconds = worker.warm_up(request, calls=protocol.min_calls, seconds=protocol.warm_up_seconds)
    return max(protocol.min_calls, min(protocol.max_calls, ceil(protocol.block_ms * 1e-3 / seconds)))


def _scaled(interval: Estimate, factor: float) -> Estimate:
    return Estimate(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)
