"""Embeddings that are to stay where the untouched model puts them."""

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
class Similarity(Task):
    """Outputs are embeddings (B, D), compared with those that the untouched model gives for the same rows.

    It needs no labels, and a trained model (`model.checkpoint` with `model.training.epochs=0`). What trains after it
    learns the model's embeddings through `distillation=outputs`.
    """

    outputs: ClassVar[Literal["classes", "numbers"]] = "numbers"
    learned_from: ClassVar[Literal["targets", "baseline"]] = "baseline"

    def targets(self, given: NDArray[Any] | None, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, 0), np.float32)

    def output_shape(self, targets: NDArray[Any]) -> None:
        return None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise PassError(
            "embeddings have no labels to learn from: give model.checkpoint and model.training.epochs=0, and train "
            "what follows with distillation=outputs"
        )
