"""Numbers for each row: a value, several, or the next values of a series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Task

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Outputs and targets are K numbers a row (B, K); of a forecast the next K values.

    Attributes:
        criterion: what training minimises: `squared_error`, `absolute_error`, or `huber`, which is squared below 1 and
            absolute above (Huber 1964).
    """

    outputs: ClassVar[Literal["classes", "numbers"]] = "numbers"

    criterion: Literal["squared_error", "absolute_error", "huber"] = "squared_error"

    def targets(self, given: NDArray[Any] | None, rows: int) -> NDArray[np.float32]:
        wanted = "data.targets must be finite numbers"
        if given is None:
            raise ConfigError(f"{wanted}, got rows without targets (rows without targets: task=unlabelled)")
        if given.dtype.kind not in "biuf":
            raise ConfigError(f"{wanted}, got {given.dtype}")
        with np.errstate(over="ignore"):
            numbers = given.astype(np.float32).reshape(len(given), -1)
        if broken := int((~np.isfinite(numbers)).any(axis=1).sum()):
            raise ConfigError(f"{wanted}, got NaN, infinite or too large ones in {broken} of {len(given)} rows")
        return numbers

    def output_shape(self, targets: NDArray[Any]) -> tuple[int, ...]:
        return (targets.shape[1],)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import huber_loss, l1_loss, mse_loss

        if self.criterion == "absolute_error":
            return l1_loss(outputs, targets)
        return huber_loss(outputs, targets) if self.criterion == "huber" else mse_loss(outputs, targets)

    def constant(self, train_targets: NDArray[Any], rows: int) -> NDArray[np.float32]:
        """The mean of the training targets."""
        return np.repeat(train_targets.mean(axis=0, keepdims=True, dtype=np.float64), rows, axis=0).astype(np.float32)
