from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass

import pytest

from hasten.core.cuda import cuda_problem
from hasten.core.errors import MeasurementError
from hasten.core.processor import float_formats
from hasten.hardware.machine import extensions, machine
from hasten.hardware.probe import Bench, Roofline, measure_gpu, probe


@pytest.mark.slow
def test_measures_this_machine() -> None:
    roofline = probe(threads=1)
    here = machine()
    known = {"L1": here.l1d_bytes, "L2": here.l2_bytes, "L3": here.l3_bytes}
    assert roofline.machine_id == here.id
    assert roofline.threads == 1
    assert {level: known[level] for level in roofline.capacity_bytes} == roofline.capacity_bytes
    assert set(roofline.bandwidth_gbs) == {*roofline.capacity_bytes, "DRAM"}
    rates = [*roofline.peak_gops.values(), *roofline.bandwidth_gbs.values()]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert {"float32"} <= set(roofline.peak_gops) <= {*float_formats(), "int8"}
    assert min(roofline.peak_gops.values()) == roofline.peak_gops["float32"], "slower formats are no peak"
    assert 0 <= roofline.noise_floor < math.inf
    assert (roofline.device, roofline.extensions) == ("cpu", extensions(here.isa))
    assert set(roofline.noise) >= {"float32", *roofline.bandwidth_gbs}
    assert all(spread >= 0 for spread in roofline.noise.values())
    assert Roofline.from_dict(json.loads(json.dumps(roofline.to_dict()))) == roofline


@pytest.mark.slow
def test_tells_why_it_could_not_be_measured() -> None:
    with pytest.raises(MeasurementError, match=r"exit code 1.*thread"):
        probe(threads=0)


def test_refuses_what_is_no_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    with pytest.raises(MeasurementError, match="unreadable"):
        probe(threads=1)


@dataclass(frozen=True)
class Properties:
    """What PyTorch tells of a GPU."""

    major: int
    minor: int
    total_memory: int = 2**31
    L2_cache_size: int = 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "found"), [(Properties(9, 0), ("tensor cores",)), (Properties(6, 1), ())])
def test_a_gpu_is_waited_for_and_measured_level_by_level(gpu: Properties, found: tuple[str, ...]) -> None:
    """The processor plays its part: what matters is what is asked, and that no time is taken before it is done."""
    waited: list[None] = []
    roofline = measure_gpu(Bench(device="cpu", wait=lambda: waited.append(None), sizes=(64, 128)), gpu, threads=1)
    assert roofline.extensions == found
    assert roofline.capacity_bytes == {"L2": 2**20}
    assert set(roofline.bandwidth_gbs) == {"L2", "DRAM"}
    assert roofline.peak_gops["float32"] > 0
    assert len(waited) > 50


@pytest.mark.gpu
@pytest.mark.skipif(cuda_problem() is not None, reason=f"{cuda_problem()}")
def test_measures_this_gpu() -> None:
    roofline = probe(threads=1, device="cuda")
    assert roofline.device == "cuda"
    assert roofline.peak_gops["float32"] > 0
    assert roofline.bandwidth_gbs["DRAM"] > 100


@pytest.mark.parametrize(
    ("isa", "told"),
    [
        (("avx2", "fma"), ("AVX2",)),
        (("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), ("AVX2", "AVX-512", "VNNI", "bfloat16")),
        (("amx_tile", "amx_fp16", "avx2", "avx_vnni"), ("AVX2", "VNNI", "AMX", "float16")),
    ],
)
def test_extensions_are_told_by_the_names_people_know(isa: tuple[str, ...], told: tuple[str, ...]) -> None:
    assert extensions(isa) == told
