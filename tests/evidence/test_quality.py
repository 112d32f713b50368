from __future__ import annotations

import numpy as np
import pytest

from hasten.core.errors import EngineError
from hasten.evidence.quality import accuracy

OUTPUTS = np.array([[0.1, 0.9, 0.0], [2.0, -1.0, 1.0], [-3.0, -2.0, -1.0]], dtype=np.float32)


def test_a_row_scores_where_its_largest_output_is_the_labels() -> None:
    scores = accuracy(OUTPUTS, np.array([1, 2, 2]))
    assert scores.tolist() == [1.0, 0.0, 1.0]
    assert scores.dtype == np.float64


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_outputs_that_are_not_finite(value: float) -> None:
    outputs = OUTPUTS.copy()
    outputs[1, 2] = value
    with pytest.raises(EngineError, match="NaN or infinite outputs for 1 of 3 rows"):
        accuracy(outputs, np.array([1, 2, 2]))


def test_refuses_outputs_of_another_shape() -> None:
    with pytest.raises(EngineError, match=r"shape \(2, classes\).*got \(3, 3\)"):
        accuracy(OUTPUTS, np.array([1, 2]))
    with pytest.raises(EngineError, match=r"got \(3,\)"):
        accuracy(OUTPUTS[:, 0], np.array([1, 2, 2]))
