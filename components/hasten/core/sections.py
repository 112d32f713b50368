"""Sections of the config that are no components: plain values with their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

Schedule = Literal["one_cycle", "cosine", "linear", "constant"]
Accelerator = Literal["cpu", "cuda", "tpu"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. `epochs` passes over the rows, `batch_size` rows per step, `lr` the peak learning rate.

    Attributes:
        schedule: how the learning rate goes to its peak and down again; see `training.schedule`.
        patience: epochs without a lower loss on held-out training rows after which it stops and goes back to its best
            weights; None trains all epochs on all rows.
        held_out: share of the training rows that judge it and are not trained on, where there is a patience. Never
            validation rows: those choose between candidates.
    """

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    schedule: Schedule = "one_cycle"
    patience: Annotated[int, Ge(1)] | None = None
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Defaults of every stage's training, and the device and the threads of the training process.

    Attributes:
        accelerator: the device; the order in which it adds floats is part of the result.
    """

    epochs: Annotated[int, Ge(0)]
    batch_size: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    threads: Annotated[int, Ge(1)]
    accelerator: Accelerator = "cpu"
    schedule: Schedule = "one_cycle"
    patience: Annotated[int, Ge(1)] | None = None
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    checkpoint_seconds: Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of the rows."""

    train: Annotated[float, Interval(gt=0, lt=1)]
    validate: Annotated[float, Interval(gt=0, lt=1)]
    test: Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How well a model does, and how much of it may be lost.

    Attributes:
        name: key below `task.metrics`.
        target: dotted path of a function of (outputs, targets) that gives one score a row (N,), or one number for all.
        max_drop: largest tolerated loss at the objective's confidence; None where it is only measured.
        relative: the loss is a share of the baseline's value.
        by_class: the loss of every single class has to hold; only of scores per row.
    """

    name: str
    target: str
    higher_is_better: bool = True
    max_drop: Annotated[float, Ge(0)] | None = None
    relative: bool = False
    by_class: bool = False
