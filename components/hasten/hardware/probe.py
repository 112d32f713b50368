"""The roofline of this machine, measured: peak arithmetic, and bandwidth of each level of the memory.

`python -m hasten.hardware.probe --threads 1` prints it as JSON in about 3 seconds; `probe` does that in a process of
its own. Model: Williams, Waterman and Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hasten.core.errors import MeasurementError
from hasten.hardware.machine import Machine, machine

if TYPE_CHECKING:
    import torch

MATMUL_SIZES = (256, 512, 1024, 2048)
MATMUL_SECONDS = 0.12
BANDWIDTH_SECONDS = 0.15
TIMEOUT_SECONDS = 120
BYTES_PER_ELEMENT = 12
"""The triad reads two float32 and writes one. What a cache reads before it writes is not counted, as in STREAM."""
SPLIT_ELEMENTS = 32768
"""PyTorch spreads an element-wise operator over threads in pieces of at least this many (at::internal::GRAIN_SIZE)."""
BLOCK_SECONDS = 4e-4


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What the machine can do at most with these threads.

    Attributes:
        peak_gflops: 10^9 float32 operations per second, 2 per multiply-add.
        peak_int8_gops: the same of 8-bit integers, summed in 32 bit; None where PyTorch's are no faster.
        bandwidth_gbs: level (`L1`, `L2`, `L3`, `DRAM`) -> 10^9 bytes read and written per second.
        capacity_bytes: cache level -> bytes that these threads have of it. L1 counts, and is measured, on one core:
            operators as small as that are not split over threads.
        noise: name of a measurement -> interquartile range over median.
    """

    peak_gflops: float
    peak_int8_gops: float | None
    bandwidth_gbs: Mapping[str, float]
    capacity_bytes: Mapping[str, int]
    noise: Mapping[str, float]
    threads: int
    machine_id: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def probe(threads: int) -> Roofline:
    """Measures in a process of its own, so that nothing of the caller's disturbs it.

    Raises:
        MeasurementError: that process failed or took longer than 2 minutes.
    """
    command = [sys.executable, "-m", "hasten.hardware.probe", "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
        return Roofline.from_dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"the roofline was not measured within {TIMEOUT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"the roofline could not be measured (exit code {error.returncode}): {last}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise MeasurementError(f"the roofline came back unreadable: {error!r}") from error


def measure(threads: int) -> Roofline:
    """Measures in this process, with PyTorch."""
    import torch

    torch.set_num_threads(threads)
    here = machine()
    capacities = _capacities(here, threads)
    with torch.inference_mode():
        peak, peak_noise = _peak(_float32_product)
        integer, integer_noise = _peak(_int8_product) if hasattr(torch, "_int_mm") else (0.0, 0.0)
        levels = {level: _bandwidth(level, capacities, threads) for level in capacities}
        levels["DRAM"] = _bandwidth_of(_dram_bytes(here), None)
    faster = integer > peak
    noise = {"float32": peak_noise} | ({"int8": integer_noise} if faster else {})
    return Roofline(
        peak_gflops=peak,
        peak_int8_gops=integer if faster else None,
        bandwidth_gbs={level: rate for level, (rate, _) in levels.items()},
        capacity_bytes=capacities,
        noise=noise | {level: spread for level, (_, spread) in levels.items()},
        threads=threads,
        machine_id=here.id,
    )


def _capacities(here: Machine, threads: int) -> dict[str, int]:
    """Level -> bytes; levels that are unknown, or no larger than the one before, are left out."""
    sizes = {"L1": here.l1d_bytes, "L2": here.l2_bytes and here.l2_bytes * threads, "L3": here.l3_bytes}
    known: dict[str, int] = {}
    for level, size in sizes.items():
        if size and size > max(known.values(), default=0):
            known[level] = size
    return known


def _dram_bytes(here: Machine) -> int:
    """A working set that no cache holds, within an eighth of the memory and what is filled in half a second."""
    wanted = max(4 * (here.l3_bytes or here.l2_bytes or 0), 64 * 2**20)
    return min(wanted, 384 * 2**20, (here.memory_bytes or 2**32) // 8)


def _float32_product(size: int) -> Callable[[], object]:
    import torch

    left, right, result = (torch.full((size, size), 0.5) for _ in range(3))
    return lambda: torch.mm(left, right, out=result)


def _int8_product(size: int) -> Callable[[], object]:
    import torch

    left, right = (torch.full((size, size), 3, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(left, right)


def _peak(product: Callable[[int], Callable[[], object]]) -> tuple[float, float]:
    """The best median rate over several sizes in 10^9 operations per second, and its noise."""
    best = (0.0, 0.0)
    for size in MATMUL_SIZES:
        run = product(size)
        if best[0] and 2 * size**3 / (best[0] * 1e9) > MATMUL_SECONDS / 4:
            break
        median, noise = _median(_repeat([run], 1, MATMUL_SECONDS)[0])
        best = max(best, (2 * size**3 / median / 1e9, noise))
    return best


def _bandwidth(level: str, capacities: Mapping[str, int], threads: int) -> tuple[float, float]:
    """Of a cache: between two working sets that fit into this level and not into the one before."""
    capacity = capacities[level]
    below = max((size for size in capacities.values() if size < capacity), default=0)
    # L3 is shared, with neighbours on a virtual machine too: they may hold the other half.
    large = capacity // 2 if level == "L3" else capacity * 3 // 4
    split = threads * SPLIT_ELEMENTS * BYTES_PER_ELEMENT if threads > 1 and level != "L1" else 0
    small = max(large // 4, below, split)
    return _bandwidth_of(large, small if small < 0.75 * large else None)


def _bandwidth_of(large: int, small: int | None) -> tuple[float, float]:
    """Rate in 10^9 bytes per second, and its noise.

    With a second, smaller working set it is the slope between both, from which the cost of the call drops out: that is
    several times what the copying of a few kilobytes takes.
    """
    triads = [_triad(size // BYTES_PER_ELEMENT) for size in (large, small) if size]
    repeats = max(1, int(BLOCK_SECONDS / max(_seconds(triad, 1) for triad, _ in triads)))
    blocks = _repeat([triad for triad, _ in triads], repeats, BANDWIDTH_SECONDS)
    num_bytes = [moved for _, moved in triads]
    if small:
        seconds, noise = _median([long - short for long, short in zip(*blocks, strict=True)])
        if seconds > 0:
            return (num_bytes[0] - num_bytes[1]) / seconds / 1e9, noise
    seconds, noise = _median(blocks[0])
    return num_bytes[0] / seconds / 1e9, noise


def _triad(num_elements: int) -> tuple[Callable[[], torch.Tensor], int]:
    """STREAM's c = a + s * b on three arrays, and the bytes that it reads and writes."""
    import torch

    a, b, c = (torch.full((num_elements,), 0.5) for _ in range(3))
    return lambda: torch.add(a, b, alpha=0.5, out=c), num_elements * BYTES_PER_ELEMENT


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """Mean of one run."""
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats


def _repeat(runs: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[list[float]]:
    """One list of times a run, taken in turns; the first turn only warms up, and at least four follow."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 4:
        for run, mine in zip(runs, times, strict=True):
            mine.append(_seconds(run, repeats))
    return times


def _median(values: list[float]) -> tuple[float, float]:
    """The median, and the interquartile range as a share of it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / middle if middle > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hasten.hardware.probe", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads that one request may use")
    print(json.dumps(measure(parser.parse_args().threads).to_dict()))


if __name__ == "__main__":
    main()
