"""Arithmetic that comes out the same again."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from hasten.core.sections import Accelerator
from hasten.training.device import XLA, xla

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def reproducible(seed: int, threads: int, accelerator: Accelerator = "cpu") -> Iterator[None]:
    """Seeds all generators, fixes the threads and refuses nondeterministic kernels; afterwards all is as it was.

    PyTorch would also fill all memory that it allocates, for the sake of code that reads what it never wrote, which
    costs a tenth of the time of a small CNN's step: that is left out.

    Args:
        threads: of torch's kernels; the order in which they add floats depends on it.
        accelerator: that calculates inside.
    """
    before = random_state()
    num_threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    strictness: Any = torch.utils.deterministic  # a module whose attribute mypy does not see
    filled, strictness.fill_uninitialized_memory = strictness.fill_uninitialized_memory, False
    if accelerator == "tpu":
        xla().set_rng_state(seed)
    try:
        with _fixed_workspace() if accelerator == "cuda" else nullcontext():
            yield
    finally:
        strictness.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.set_num_threads(num_threads)
        restore_random_state(before)


@contextmanager
def _fixed_workspace() -> Iterator[None]:
    """A setting of cuBLAS without which it may add in another order each time, and PyTorch refuses to multiply.

    It holds from the first product of a process on (cuBLAS documentation, "Results reproducibility").
    """
    before = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WORKSPACE]


def random_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch, on every device that is in use, as tensors and plain data."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    if XLA in sys.modules:
        state["xla"] = xla().get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if "xla" in state:
        xla().set_rng_state(state["xla"])
