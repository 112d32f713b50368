"""How the learning rate goes to its peak and down again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from hasten.core.sections import Schedule

WARM_UP = 0.05
"""Share of the steps in which `cosine` and `linear` rise to the peak: Adam's first steps rest on few gradients."""

_AFTER_WARM_UP: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}


def scheduler(kind: Schedule, optimizer: torch.optim.Optimizer, lr: float, total_steps: int) -> LRScheduler:
    """A learning rate for each step.

    `one_cycle` rises for 30 % of the steps and falls along cosines, with the momentum the other way round (Smith and
    Topin 2018). `cosine` falls along half a period, without restarts (Loshchilov and Hutter 2017); `linear` along a
    line; both to zero, after a linear rise in the first 5 % of the steps. `constant` stays.

    Args:
        lr: the peak.
    """
    if kind == "one_cycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps)
    return LambdaLR(optimizer, lambda step: share_of_peak(kind, step, total_steps))


def share_of_peak(kind: Schedule, step: int, total_steps: int) -> float:
    """Learning rate of a step, from 0, as a share of the peak, in (0, 1]; not of `one_cycle`."""
    if kind == "constant":
        return 1.0
    rising = int(WARM_UP * total_steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return _AFTER_WARM_UP[kind]((step - rising) / (total_steps - rising))
