from __future__ import annotations

import json
import math
import sys

import pytest

from hasten.core.errors import MeasurementError
from hasten.hardware.machine import machine
from hasten.hardware.probe import Roofline, probe


@pytest.mark.slow
def test_measures_this_machine() -> None:
    roofline = probe(threads=1)
    here = machine()
    known = {"L1": here.l1d_bytes, "L2": here.l2_bytes, "L3": here.l3_bytes}
    assert roofline.machine_id == here.id
    assert roofline.threads == 1
    assert {level: known[level] for level in roofline.capacity_bytes} == roofline.capacity_bytes
    assert set(roofline.bandwidth_gbs) == {*roofline.capacity_bytes, "DRAM"}
    rates = [roofline.peak_gflops, *roofline.bandwidth_gbs.values()]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert roofline.peak_int8_gops is None or roofline.peak_int8_gops > roofline.peak_gflops
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
