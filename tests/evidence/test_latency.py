from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from filelock import FileLock, Timeout

from hasten.core.errors import EngineError
from hasten.core.interfaces import Target
from hasten.evidence.latency import (
    LatencyProtocol,
    Measurement,
    is_settled,
    latency_ms,
    measure,
    measuring_alone,
    measuring_cpus,
    speedups,
    throughput,
)
from hasten.evidence.process import serving_environment
from hasten.evidence.worker import write_inputs

Serve = Callable[..., Path]

ROWS = [np.ones((1, 2), dtype=np.float32)]
QUICK = LatencyProtocol(block_ms=1, max_calls=10, warm_up_seconds=0.0, min_rounds=5, max_rounds=8)


def target(**changes: Any) -> Target:
    return replace(Target(device="cpu", threads=1, batch_size=4, engines=("fake",)), **changes)


def measured(candidate: list[list[float]], launch_sd: float = 0.0, **references: list[list[float]]) -> Measurement:
    blocks_us = {"candidate": candidate, **references}
    return Measurement(
        blocks_us={name: tuple(map(tuple, blocks)) for name, blocks in blocks_us.items()},
        memory_bytes=dict.fromkeys(blocks_us, 1_000_000),
        batch_size=4,
        cpus=(0,),
        environment={},
        protocol=LatencyProtocol(launch_sd=launch_sd),
        seed=0,
    )


def test_figures_follow_from_the_blocks() -> None:
    measurement = measured([[100.0] * 9 + [300.0]] * 20, eager=[[400.0]] * 20, engine=[[100.0, 100.0, 130.0]] * 20)
    latency = latency_ms(measurement, 0.95)
    assert [latency[name].value for name in ("p50", "p90", "p99")] == pytest.approx([0.1, 0.1, 0.3])
    assert throughput(measurement, 0.95).value == pytest.approx(4 * 10 / 1200e-6)
    assert {name: ratio.value for name, ratio in speedups(measurement, 0.95).items()} == {"eager": 4, "engine": 1}
    assert latency_ms(measurement, 0.95, "eager")["p50"].value == pytest.approx(0.4)


def test_the_mean_weighs_the_slow_requests_that_a_percentile_leaves_out() -> None:
    measurement = measured([[100.0] * 9 + [300.0]] * 20, eager=[[200.0] * 10] * 20)
    by_mean = speedups(measurement, 0.95, "mean")["eager"].value
    assert by_mean == pytest.approx(200 / 120)
    assert by_mean == pytest.approx(throughput(measurement, 0.95).value / throughput(measurement, 0.95, "eager").value)
    assert speedups(measurement, 0.95, "p50")["eager"].value == pytest.approx(2)
    assert speedups(measurement, 0.95, "p99")["eager"].value < 1


def test_intervals_say_what_may_change_at_the_next_launch() -> None:
    measurement = measured([[100.0]] * 20, launch_sd=0.01, eager=[[200.0]] * 20)
    unseen = 1.959964 * 0.01
    assert speedups(measurement, 0.95)["eager"].low == pytest.approx(2 * exp(-(2**0.5) * unseen))
    assert latency_ms(measurement, 0.95)["p50"].high == pytest.approx(0.1 * exp(unseen))
    assert throughput(measurement, 0.95).low == pytest.approx(40_000 * exp(-unseen))


def test_is_settled_when_every_interval_is_narrow_enough() -> None:
    rng = np.random.default_rng(0)
    quiet, noisy = (rng.normal(100, sd, size=(20, 5)).tolist() for sd in (0.5, 30))
    protocol = LatencyProtocol(precision=0.02)
    assert is_settled(measured(quiet, eager=quiet[::-1]).blocks_us, protocol, seed=0)
    assert is_settled(measured(quiet).blocks_us, protocol, seed=0)
    assert not is_settled(measured(quiet, eager=quiet[::-1], engine=noisy).blocks_us, protocol, seed=0)
    assert not is_settled(measured(noisy).blocks_us, protocol, seed=0)


def test_a_faster_candidate_is_found_to_be_faster(serve: Serve) -> None:
    slow, fast = serve("Doubling", microseconds=600), serve("Doubling", microseconds=100)
    measurement = measure(fast, {"eager": slow, "engine": fast}, target(), ROWS, QUICK, seed=3)
    ratios = speedups(measurement, 0.95)
    assert ratios["eager"].low > 1
    assert ratios["eager"].value > ratios["engine"].value
    assert 5 <= measurement.num_rounds <= 8
    assert {len(blocks) for blocks in measurement.blocks_us.values()} == {measurement.num_rounds}
    assert all(len(block) <= 10 for block in measurement.blocks_us["candidate"])
    assert all(memory > 1_000_000 for memory in measurement.memory_bytes.values())
    assert measurement.environment == serving_environment(1)


def test_goes_on_until_the_intervals_are_narrow_or_the_rounds_are_used_up(serve: Serve) -> None:
    folder = serve("Doubling", microseconds=50)
    told: list[None] = []
    wide = replace(QUICK, precision=100.0)
    satisfied = measure(folder, {}, target(), ROWS, wide, seed=0, on_round=lambda: told.append(None))
    never = measure(folder, {"eager": folder}, target(), ROWS, replace(QUICK, precision=1e-9), seed=0)
    hasty = measure(folder, {}, target(), ROWS, replace(QUICK, precision=1e-9, max_seconds=1e-6), seed=0)
    assert (satisfied.num_rounds, never.num_rounds, hasty.num_rounds) == (5, 8, 5)
    assert len(told) == 5


def test_a_stored_measurement_gives_the_same_figures(serve: Serve) -> None:
    folder = serve("Doubling")
    measurement = measure(folder, {"eager": folder}, target(), ROWS, QUICK, seed=1)
    stored = Measurement.from_dict(json.loads(json.dumps(measurement.to_dict())))
    assert stored == measurement
    assert speedups(stored, 0.9) == speedups(measurement, 0.9)
    assert latency_ms(stored, 0.9) == latency_ms(measurement, 0.9)
    assert throughput(stored, 0.9) == throughput(measurement, 0.9)


@pytest.mark.parametrize(("batch_size", "num_rows"), [(5, 2), (2, 5)])
def test_a_request_has_the_targets_batch_size(serve: Serve, batch_size: int, num_rows: int) -> None:
    rows = [np.arange(num_rows, dtype=np.float32)[:, None]]
    with pytest.raises(EngineError, match=rf"shape \({batch_size}, 1\)"):
        measure(serve("Shy"), {}, target(batch_size=batch_size), rows, QUICK, seed=0)


def test_every_input_of_a_request_has_the_targets_batch_size(serve: Serve) -> None:
    both = [np.arange(4).reshape(2, 2), np.ones((2, 2), np.float32)]
    measurement = measure(serve("Subtracting"), {}, target(batch_size=3), both, QUICK, seed=0)
    assert measurement.batch_size == 3
    assert measurement.num_rounds >= 5


def test_a_broken_reference_says_why(serve: Serve) -> None:
    with pytest.raises(EngineError, match="SIGSEGV"):
        measure(serve("Doubling"), {"eager": serve("Segfaulting")}, target(), ROWS, QUICK, seed=0)


def test_holds_the_measuring_lock_while_it_times(serve: Serve) -> None:
    measure(serve("Locked"), {}, target(), ROWS, QUICK, seed=0)
    with pytest.raises(EngineError, match="measured without the lock"):
        _without_lock(serve("Locked"))


def _without_lock(folder: Path) -> None:
    from hasten.evidence.process import Worker

    with Worker(threads=1) as worker:
        worker.load(folder)
        worker.time(write_inputs(folder / "rows.npz", ROWS), settle=0, calls=1)


def test_only_one_measures_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hasten.evidence.latency")
    order = []

    def other() -> None:
        with measuring_alone():
            order.append("other")

    thread = threading.Thread(target=other)
    with measuring_alone():
        with pytest.raises(Timeout):
            FileLock(Path(tempfile.gettempdir()) / "hasten-measuring.lock").acquire(timeout=0)
        thread.start()
        while not caplog.records:
            os.sched_yield()
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    assert "waiting for another measurement" in caplog.text


def test_every_user_of_the_machine_can_take_the_lock(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        with measuring_alone(tmp_path / "lock"):
            assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o666
    finally:
        os.umask(mask)


def test_participants_share_as_many_cpus_as_a_request_has_threads() -> None:
    allowed = os.sched_getaffinity(0)
    assert len(measuring_cpus(1)) == 1
    assert measuring_cpus(1) <= allowed
    assert measuring_cpus(10_000) == allowed


def test_every_knob_declares_its_range() -> None:
    hints = get_type_hints(LatencyProtocol, include_extras=True)
    assert all(hint.__metadata__ for hint in hints.values())
