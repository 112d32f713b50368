"""`hasten` with an engine that crashes, hangs or eats all memory: it costs one iteration, and the reason is told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ENGINE = """
import ctypes
import time
from dataclasses import dataclass

from hasten.core.interfaces import Engine

@dataclass(frozen=True, kw_only=True)
class Failing(Engine):
    family = "onnxruntime"
    libraries = ()
    step: str = "load"
    how: str = "raise"

    def supports(self, quantized, target):
        return None

    def compile(self, graph, folder):
        (folder / "half").write_text("written")
        self.fail("compile")

    def load(self, folder):
        self.fail("load")
        return lambda inputs: self.fail("request")

    def fail(self, step):
        while step == self.step:
            if self.how == "raise":
                raise MemoryError("std::bad_alloc")
            if self.how == "segfault":
                ctypes.string_at(0)
            if self.how == "hang":
                time.sleep(3600)
            if self.how == "eat":
                eaten = [bytearray(2**22) for _ in range(10**6)]

    def integer_share(self, folder):
        return 0.0

    def operators(self, folder, inputs, repeats):
        return []
"""
LIMIT_MB = 1500
"""More than torch, ONNX Runtime and a tiny network need."""
REASONS = {
    "raise": "MemoryError: std::bad_alloc",
    "segfault": "the process died of signal SIGSEGV during {step}",
    "hang": "took longer than",
    "eat": f"MB of memory, target.memory_limit_mb={LIMIT_MB} allows {LIMIT_MB} MB",
}
QUICK = ("compile", "segfault"), ("load", "eat"), ("request", "hang"), ("request", "raise")
ALL = tuple((step, how) for step in ("compile", "load", "request") for how in REASONS)
STRATEGY = """# @package strategies.{name}
# For a test
addresses: {{overhead: {gain}, compute: {gain}, memory: {gain}}}
attempts: [[{edit}]]
search: null
cost: 5
"""


def write_conf(folder: Path, failures: Iterable[tuple[str, str]]) -> list[str]:
    """The engine and a strategy for each failure, all of which promise more than the one that works.

    Returns:
        Names of the strategies.
    """
    edits = {f"{step}_{how}": f"engine=failing, engine.step={step}, engine.how={how}" for step, how in failures}
    edits["works"] = "engine=onnxruntime"
    (folder / "failing_engine.py").write_text(ENGINE)
    for group in ("engine", "strategy"):
        (folder / "conf" / group).mkdir(parents=True)
    node = "# Fails\n_target_: failing_engine.Failing\nstep: load\nhow: raise\n"
    (folder / "conf" / "engine" / "failing.yaml").write_text(node)
    for place, (name, edit) in enumerate(edits.items()):
        text = STRATEGY.format(name=name, gain=40 - place, edit=edit)
        (folder / "conf" / "strategy" / f"{name}.yaml").write_text(text)
    return list(edits)


def overrides(strategies: Sequence[str]) -> list[str]:
    return [
        f"strategy=[{','.join(strategies)}]",
        f"planner.max_trials={len(strategies)}",
        "target.engines=[eager,failing,onnxruntime]",
        f"target.memory_limit_mb={LIMIT_MB}",
        "target.request_timeout_seconds=5",
    ]


def assert_each_cost_one_iteration(done: Any, failures: Sequence[tuple[str, str]], store: Path) -> None:
    assert done.code == 0, done.told
    trials = {trial["strategy"]: trial for trial in done.summary["trials"][1:]}
    assert list(trials) == [*(f"{step}_{how}" for step, how in failures), "works"]
    for step, how in failures:
        trial = trials[f"{step}_{how}"]
        assert trial["verdict"] == "failed"
        assert trial["evaluation"] is None
        assert REASONS[how].format(step=step) in trial["reason"], trial["reason"]
        assert how == "raise" or step in trial["reason"]
        # the reason is told where the iteration is
        assert " ".join(trial["reason"].split())[:40] in " ".join(done.printed.split())
    assert done.summary["best"]["strategy"] == "works"
    assert (done.folder / "model" / "model.json").is_file()
    assert "engine failing is left out: MemoryError: std::bad_alloc" in done.told
    assert "Traceback" not in done.told + done.printed
    failed = [step for step, _ in failures if step == "compile"]
    finished = [json.loads(file.read_text()) for file in store.glob("compile/*/stage.json")]
    engines = [stage["ingredients"]["config"]["engine"] for stage in finished]
    compiled = [engine for engine in engines if engine["_target_"] == "failing_engine.Failing"]
    assert len(compiled) == len({(step, how) for step, how in (*failures, ("load", "raise"))}) - len(failed)
    assert not [engine for engine in compiled if engine["step"] == "compile"], "half-written, and kept as finished"


@pytest.mark.drill
def test_an_engine_that_fails_costs_one_iteration_and_a_reason(hasten: Any, store: Path, tmp_path: Path) -> None:
    done = hasten("--config-dir", "conf", *overrides(write_conf(tmp_path, QUICK)))
    assert_each_cost_one_iteration(done, QUICK, store)


def test_a_baseline_over_the_limit_is_a_plain_error(hasten: Any, tmp_path: Path) -> None:
    done = hasten("strategy=[]", "target.memory_limit_mb=40", f"store.folder={tmp_path / 'store'}")
    assert done.code == 1
    assert "MB of memory, target.memory_limit_mb=40 allows 40 MB" in " ".join(done.told.split())
    assert "Traceback" not in done.told


def test_a_limit_that_comes_later_holds_for_what_the_store_has(hasten: Any, ran: Any) -> None:
    peak = ran.summary["best"]["evaluation"]["memory_bytes"] / 1e6
    done = hasten("run", "engine=onnxruntime", f"target.memory_limit_mb={0.9 * peak:.0f}")
    assert done.code == 1
    told = f"MB of memory at its peak, target.memory_limit_mb={0.9 * peak:.0f} allows"
    assert told in " ".join(done.told.split())


@pytest.mark.drill
def test_every_failure_in_every_step(hasten: Any, store: Path, tmp_path: Path) -> None:
    done = hasten("--config-dir", "conf", *overrides(write_conf(tmp_path, ALL)), "target.timeout_seconds=40")
    assert_each_cost_one_iteration(done, ALL, store)
