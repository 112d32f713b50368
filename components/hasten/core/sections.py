"""Sections of the config that are no components: plain values with their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. `epochs` passes over the rows, `batch_size` rows per step, `lr` the peak learning rate."""

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Defaults of every stage's training, and the threads of the training process."""

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    threads: Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    checkpoint_seconds: Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of the rows."""

    train: Annotated[float, Interval(gt=0, lt=1)]
    validate: Annotated[float, Interval(gt=0, lt=1)]
    test: Annotated[float, Interval(gt=0, lt=1)]
