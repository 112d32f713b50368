"""The device that a training runs on, as PyTorch and Lightning call it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from hasten.core.sections import Accelerator

LIGHTNING: Mapping[Accelerator, str] = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
"""Lightning's accelerators."""

XLA = "torch_xla.core.xla_model"
_TORCH: Mapping[Accelerator, str] = {"cpu": "cpu", "cuda": "cuda", "tpu": "xla"}


def device_of(accelerator: Accelerator) -> torch.device:
    """The device that tensors have to be on."""
    if accelerator == "tpu":
        xla()  # PyTorch knows of the device once torch_xla is imported
    return torch.device(_TORCH[accelerator])


def finish(accelerator: Accelerator) -> None:
    """Waits until all that was asked of the device is calculated."""
    if accelerator == "cuda":
        torch.cuda.synchronize()
    elif accelerator == "tpu":
        xla().mark_step(wait=True)


def xla() -> Any:
    """The module of torch_xla that runs models."""
    return import_module(XLA)
