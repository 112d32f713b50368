"""The roofline of this machine, measured: peak arithmetic, and bandwidth of each level of the memory.

`python -m hasten.hardware.probe --threads 1` prints it as JSON in about 4 seconds; `probe` does that in a process of
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
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hasten.core.cuda import Gpu
from hasten.core.errors import MeasurementError
from hasten.core.processor import float_formats
from hasten.hardware.machine import Machine, extensions, machine

if TYPE_CHECKING:
    import torch

MATMUL_SIZES = (256, 512, 1024, 2048)
GPU_MATMUL_SIZES = (1024, 2048, 4096, 8192)
MATMUL_SECONDS = 0.12
BANDWIDTH_SECONDS = 0.15
NOISE_SECONDS = 0.05
NOISE_REPEATS = 8
"""Identical measurements whose spread is the noise floor, and how long each lasts."""
TIMEOUT_SECONDS = 120
BYTES_PER_ELEMENT = 12
"""The triad reads two float32 and writes one. What a cache reads before it writes is not counted, as in STREAM."""
SPLIT_ELEMENTS = 32768
"""PyTorch spreads an element-wise operator over threads in pieces of at least this many (at::internal::GRAIN_SIZE)."""
BLOCK_SECONDS = 4e-4
TENSOR_CORES_FROM = (7, 0)
"""Compute capability from which on a GPU multiplies matrices in tensor cores (CUDA C++ Programming Guide)."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What the machine can do at most with these threads.

    Attributes:
        peak_gops: number format -> 10^9 operations per second, 2 per multiply-add: `float32`, and of `bfloat16`,
            `float16` and `int8` (summed in 32 bit) those which the hardware has and PyTorch multiplies faster in.
        bandwidth_gbs: level (`L1`, `L2`, `L3`, `DRAM`) -> 10^9 bytes read and written per second.
        capacity_bytes: cache level -> bytes that these threads have of it. L1 counts, and is measured, on one core:
            operators as small as that are not split over threads.
        extensions: what decides which kernels run: `AVX2`, `AVX-512`, `VNNI`, `AMX`, `bfloat16`, `float16` of a
            processor, `tensor cores` of a GPU.
        noise: name of a measurement -> interquartile range over median.
        noise_floor: spread of the medians of identical measurements, highest less lowest, over their median. What
            differs by less can't be told apart by measuring each once.
        device: what was measured, PyTorch's name for it.
    """

    peak_gops: Mapping[str, float]
    bandwidth_gbs: Mapping[str, float]
    capacity_bytes: Mapping[str, int]
    extensions: tuple[str, ...]
    noise: Mapping[str, float]
    noise_floor: float
    threads: int
    machine_id: str
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "extensions": tuple(known["extensions"])})


def probe(threads: int, device: Device = "cpu") -> Roofline:
    """Measures in a process of its own, so that nothing of the caller's disturbs it.

    Raises:
        MeasurementError: that process failed or took longer than 2 minutes.
    """
    command = [sys.executable, "-m", "hasten.hardware.probe", "--threads", str(threads), "--device", device]
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


class GpuProperties(Protocol):
    """What `torch.cuda.get_device_properties` tells, as far as it is needed here."""

    major: int
    minor: int
    total_memory: int
    L2_cache_size: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where arithmetic and copies are timed.

    Attributes:
        device: PyTorch's name of it.
        wait: returns when all that was asked of the device is done.
        sizes: rows and columns of the products that are tried, growing.
    """

    device: str
    wait: Callable[[], object]
    sizes: Sequence[int]


def measure(threads: int, device: Device = "cpu") -> Roofline:
    """Measures in this process, with PyTorch."""
    import torch

    torch.set_num_threads(threads)
    if device == "cuda":
        bench = Bench(device="cuda", wait=torch.cuda.synchronize, sizes=GPU_MATMUL_SIZES)
        return measure_gpu(bench, torch.cuda.get_device_properties(0), threads)
    return measure_cpu(Bench(device="cpu", wait=lambda: None, sizes=MATMUL_SIZES), threads)


def measure_cpu(bench: Bench, threads: int) -> Roofline:
    """The processor with so many threads, which PyTorch was told before."""
    import torch

    here = machine()
    capacities = _capacities(here, threads)
    with torch.inference_mode():
        peaks = _peaks(bench, (*float_formats(), "int8"))
        levels = {level: _bandwidth(bench, level, capacities, threads) for level in capacities}
        levels["DRAM"] = _bandwidth_of(bench, _dram_bytes(here), None)
        floor = _noise_floor(bench)
    return _roofline(peaks, levels, capacities, floor, extensions(here.isa), threads, here, bench)


def measure_gpu(bench: Bench, gpu: GpuProperties, threads: int) -> Roofline:
    """One GPU: its L2 and its memory; what lies nearer to its cores no operator's inputs stay in."""
    import torch

    capability = gpu.major, gpu.minor
    capacities = {"L2": gpu.L2_cache_size} if gpu.L2_cache_size else {}
    large = min(max(8 * gpu.L2_cache_size, 2**28), gpu.total_memory // 8)
    with torch.inference_mode():
        peaks = _peaks(bench, (*Gpu(name="", capability=capability).float_formats, "int8"))
        levels = {level: _bandwidth_of(bench, size // 2, size // 8) for level, size in capacities.items()}
        levels["DRAM"] = _bandwidth_of(bench, large, None)
        floor = _noise_floor(bench)
    found = ("tensor cores",) if capability >= TENSOR_CORES_FROM else ()
    return _roofline(peaks, levels, capacities, floor, found, threads, machine(), bench)


_Rate = tuple[float, float]
"""10^9 operations or bytes per second, and the noise of that measurement."""


def _roofline(
    peaks: Mapping[str, _Rate],
    levels: Mapping[str, _Rate],
    capacities: Mapping[str, int],
    noise_floor: float,
    found: tuple[str, ...],
    threads: int,
    here: Machine,
    bench: Bench,
) -> Roofline:
    slowest = peaks["float32"][0]
    kept = {name: peak for name, peak in peaks.items() if name == "float32" or peak[0] > slowest}
    return Roofline(
        peak_gops={name: rate for name, (rate, _) in kept.items()},
        bandwidth_gbs={level: rate for level, (rate, _) in levels.items()},
        capacity_bytes=dict(capacities),
        extensions=found,
        noise={name: spread for name, (_, spread) in {**kept, **levels}.items()},
        noise_floor=noise_floor,
        threads=threads,
        machine_id=here.id,
        device=bench.device,
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


def _peaks(bench: Bench, formats: Sequence[str]) -> dict[str, _Rate]:
    """Of each format that PyTorch multiplies in here."""
    import torch

    found = {}
    for name in formats:
        try:
            found[name] = _peak(bench, name)
        except (RuntimeError, NotImplementedError, AttributeError):  # no kernel of this build for this device
            if name == "float32":
                raise
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return found


def _product(bench: Bench, name: str, size: int) -> Callable[[], object]:
    """A product of two square matrices in one format."""
    import torch

    if name == "int8":
        left, right = (torch.full((size, size), 3, dtype=torch.int8, device=bench.device) for _ in range(2))
        return lambda: torch._int_mm(left, right)
    dtype = getattr(torch, name)
    left, right, result = (torch.full((size, size), 0.5, dtype=dtype, device=bench.device) for _ in range(3))
    return lambda: torch.mm(left, right, out=result)


def _peak(bench: Bench, name: str) -> _Rate:
    """The best median rate over several sizes in 10^9 operations per second, and its noise."""
    best = (0.0, 0.0)
    for size in bench.sizes:
        run = _product(bench, name, size)
        expected = 2 * size**3 / (best[0] * 1e9) if best[0] else _seconds(bench, run, 1)
        if best[0] and expected > MATMUL_SECONDS / 4:
            break
        # Several at a time where one is short: waiting for a GPU takes as long as a small product.
        repeats = max(1, int(BLOCK_SECONDS / expected))
        median, noise = _median(_repeat(bench, [run], repeats, MATMUL_SECONDS)[0])
        best = max(best, (2 * size**3 / median / 1e9, noise))
    return best


def _noise_floor(bench: Bench) -> float:
    """The spread between measurements of one and the same product."""
    run = _product(bench, "float32", bench.sizes[0])
    medians = [_median(_repeat(bench, [run], 1, NOISE_SECONDS)[0])[0] for _ in range(NOISE_REPEATS)]
    return (max(medians) - min(medians)) / statistics.median(medians)


def _bandwidth(bench: Bench, level: str, capacities: Mapping[str, int], threads: int) -> _Rate:
    """Of a cache: between two working sets that fit into this level and not into the one before."""
    capacity = capacities[level]
    below = max((size for size in capacities.values() if size < capacity), default=0)
    # L3 is shared, with neighbours on a virtual machine too: they may hold the other half.
    large = capacity // 2 if level == "L3" else capacity * 3 // 4
    split = threads * SPLIT_ELEMENTS * BYTES_PER_ELEMENT if threads > 1 and level != "L1" else 0
    small = max(large // 4, below, split)
    return _bandwidth_of(bench, large, small if small < 0.75 * large else None)


def _bandwidth_of(bench: Bench, large: int, small: int | None) -> _Rate:
    """Rate in 10^9 bytes per second, and its noise.

    With a second, smaller working set it is the slope between both, from which the cost of the call drops out: that is
    several times what the copying of a few kilobytes takes.
    """
    triads = [_triad(bench, size // BYTES_PER_ELEMENT) for size in (large, small) if size]
    repeats = max(1, int(BLOCK_SECONDS / max(_seconds(bench, triad, 1) for triad, _ in triads)))
    blocks = _repeat(bench, [triad for triad, _ in triads], repeats, BANDWIDTH_SECONDS)
    num_bytes = [moved for _, moved in triads]
    if small:
        seconds, noise = _median([long - short for long, short in zip(*blocks, strict=True)])
        if seconds > 0:
            return (num_bytes[0] - num_bytes[1]) / seconds / 1e9, noise
    seconds, noise = _median(blocks[0])
    return num_bytes[0] / seconds / 1e9, noise


def _triad(bench: Bench, num_elements: int) -> tuple[Callable[[], torch.Tensor], int]:
    """STREAM's c = a + s * b on three arrays, and the bytes that it reads and writes."""
    import torch

    a, b, c = (torch.full((num_elements,), 0.5, device=bench.device) for _ in range(3))
    return lambda: torch.add(a, b, alpha=0.5, out=c), num_elements * BYTES_PER_ELEMENT


def _seconds(bench: Bench, run: Callable[[], object], repeats: int) -> float:
    """Mean of one run."""
    start = perf_counter()
    for _ in range(repeats):
        run()
    bench.wait()
    return (perf_counter() - start) / repeats


def _repeat(bench: Bench, runs: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[list[float]]:
    """One list of times a run, taken in turns; the first turn only warms up, and at least four follow."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    bench.wait()
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 4:
        for run, mine in zip(runs, times, strict=True):
            mine.append(_seconds(bench, run, repeats))
    return times


def _median(values: list[float]) -> tuple[float, float]:
    """The median, and the interquartile range as a share of it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / middle if middle > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hasten.hardware.probe", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads that one request may use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured")
    asked = parser.parse_args()
    print(json.dumps(measure(asked.threads, asked.device).to_dict()))


if __name__ == "__main__":
    main()
