"""What is measured of a GPU, told by an nvidia-smi of three lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.core.cuda import process_bytes
from hasten.core.interfaces import Target
from hasten.evidence import latency
from hasten.evidence.worker import Server

MIB = 2**20
RESERVED = 2**40
"""Bytes: more than a machine has of its own memory, so that its part does not matter."""


def nvidia_smi(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{answer}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def pytorch(monkeypatch: pytest.MonkeyPatch, *, used: bool) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: used, max_memory_reserved=lambda: RESERVED)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def host_bytes(monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return Server().memory()


def test_the_driver_tells_what_a_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "71, 300\n7, 512\n7, 256\n8, [N/A]", monkeypatch)
    assert process_bytes(7) == 768 * MIB
    assert process_bytes(71) == 300 * MIB
    assert process_bytes(8) is None
    assert process_bytes(1) is None


def test_memory_is_that_of_the_process_and_of_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch(monkeypatch, used=True)
    nvidia_smi(tmp_path, f"{os.getpid()}, {2 * RESERVED // MIB}", monkeypatch)
    assert Server().memory() - host_bytes(monkeypatch) == pytest.approx(2 * RESERVED, rel=0.01)


def test_where_the_driver_does_not_tell_processes_apart_pytorch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytorch(monkeypatch, used=True)
    nvidia_smi(tmp_path, "", monkeypatch)
    assert Server().memory() - host_bytes(monkeypatch) == pytest.approx(RESERVED, rel=0.01)


def test_without_a_gpu_it_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch(monkeypatch, used=False)
    assert 0 < Server().memory() < RESERVED


@pytest.mark.gpu
def test_weights_on_the_gpu_count() -> None:
    import torch

    before = Server().memory()
    weights = torch.zeros(256 * MIB // 4, device="cuda")
    assert Server().memory() - before >= weights.nbytes


@pytest.mark.parametrize(("least", "given", "kept"), [(0.05, 0.01, 0.05), (0.05, 0.06, 0.06)])
def test_a_gpu_is_warmed_up_for_longer(
    serve: Any, monkeypatch: pytest.MonkeyPatch, least: float, given: float, kept: float
) -> None:
    monkeypatch.setattr(latency, "GPU_WARM_UP_SECONDS", least)
    protocol = latency.LatencyProtocol(warm_up_seconds=given, min_rounds=2, max_rounds=2, block_ms=1.0, max_calls=5)
    rows = [np.ones((1, 2), np.float32)]
    target = Target(device="gpu", threads=1, batch_size=1, engines=("eager",))
    measured = latency.measure(serve("Doubling"), {}, target, rows, protocol, seed=0)
    assert measured.protocol.warm_up_seconds == kept
