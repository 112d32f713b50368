"""Rows without labels: the untouched model's own outputs are all there is to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from hasten.core.errors import PassError
from hasten.core.interfaces import Task

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Task):
    """A trained model and some rows to calibrate with; nothing is trained, and quality can't be checked."""

    outputs: ClassVar[Literal["classes", "numbers"]] = "numbers"
    trains: ClassVar[bool] = False
    learned_from: ClassVar[Literal["targets", "baseline"]] = "baseline"

    def targets(self, given: NDArray[Any] | None, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, 0), np.float32)

    def output_shape(self, targets: NDArray[Any]) -> None:
        return None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise PassError("nothing can be trained on rows without labels (task=unlabelled)")
