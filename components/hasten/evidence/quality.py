"""Scores of single rows, so that a candidate and its baseline are compared row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import EngineError


def accuracy(outputs_BC: NDArray[Any], labels_B: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """1 where the largest output is the label's, else 0; the mean is the accuracy.

    Raises:
        EngineError: other than one row of outputs a label, or outputs that are not finite.
    """
    if outputs_BC.ndim != 2 or len(outputs_BC) != len(labels_B):
        wanted = f"({len(labels_B)}, classes)"
        raise EngineError(f"the engine's outputs must have the shape {wanted} to be classified, got {outputs_BC.shape}")
    broken = int((~np.isfinite(outputs_BC)).any(axis=1).sum())
    if broken:
        raise EngineError(f"the engine gave NaN or infinite outputs for {broken} of {len(labels_B)} rows")
    scores_B: NDArray[np.float64] = (outputs_BC.argmax(axis=1) == labels_B).astype(np.float64)
    return scores_B
