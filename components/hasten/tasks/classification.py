"""One class of several for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Interval

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Task

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Outputs are one logit a class (B, C); targets are class numbers from 0.

    Attributes:
        label_smoothing: share of the target's probability that is spread over all classes (Szegedy et al. 2016).
    """

    outputs: ClassVar[Literal["classes", "numbers"]] = "classes"

    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0

    def targets(self, given: NDArray[Any] | None, rows: int) -> NDArray[np.int64]:
        wanted = "data.targets must be integer labels from 0"
        if given is None:
            raise ConfigError(f"{wanted}, got rows without labels (rows without labels: task=unlabelled)")
        if given.ndim != 1:
            remedy = "; labels in one-hot form: np.argmax(targets, axis=1)" if given.ndim == 2 else ""
            raise ConfigError(f"{wanted}, one a row, got {given.shape}{remedy}")
        if given.dtype.kind not in "biu":
            raise ConfigError(f"{wanted}, got {given.dtype} (numbers to predict: task=regression)")
        if given.size and given.min() < 0:
            below = int(np.count_nonzero(given < 0))
            raise ConfigError(f"{wanted}, got {below} below 0, the least {given.min()}")
        if len(kinds := np.unique(given)) < 2:
            raise ConfigError(f"data.targets must hold at least 2 different labels, got {kinds.tolist()}")
        return given.astype(np.int64)

    def output_shape(self, targets: NDArray[Any]) -> tuple[int, ...]:
        return (int(targets.max()) + 1,)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def labels(self, targets: NDArray[Any]) -> NDArray[Any]:
        return targets

    def constant(self, train_targets: NDArray[Any], rows: int) -> NDArray[np.float32]:
        """Logarithms of the classes' shares, one row more of each so that none is 0; the commonest is the answer."""
        counts = np.bincount(train_targets) + 1
        return np.tile(np.log(counts / counts.sum()).astype(np.float32), (rows, 1))
