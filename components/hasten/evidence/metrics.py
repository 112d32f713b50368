"""What a model's outputs are worth: functions of outputs and targets, named by `task.metrics.<name>._target_`.

A function gives a score for each row, (N,), whose mean is the metric, or one float where the metric is no mean over
rows. Scores of rows compare a candidate with its baseline row by row, so they certify smaller drops.

The recall of each class is `accuracy` with `by_class: true`: the share of the rows of a class that are right.

Shapes: N rows, C classes, K outputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import EngineError

Floats = NDArray[np.float64]


def accuracy(outputs_NC: NDArray[Any], labels_N: NDArray[np.integer[Any]]) -> Floats:
    """1 where the largest output is the label's, else 0; the mean is the accuracy.

    Raises:
        EngineError: other than one row of outputs a label, or outputs that are not finite.
    """
    _check_classes(outputs_NC, labels_N)
    scores_N: Floats = (outputs_NC.argmax(axis=1) == labels_N).astype(np.float64)
    return scores_N


def macro_f1(outputs_NC: NDArray[Any], labels_N: NDArray[np.integer[Any]]) -> float:
    """Mean over classes of 2 * hits / (rows of the class + rows taken for it), each class with the same weight.

    Classes that no row has and no row is taken for are left out, as by scikit-learn's `f1_score(average="macro")`.

    Raises:
        EngineError: as `accuracy`, or no rows.
    """
    _check_classes(outputs_NC, labels_N)
    if not len(labels_N):
        raise EngineError("macro_f1 needs at least 1 row, got none")
    taken_N = outputs_NC.argmax(axis=1)
    num_classes = max(outputs_NC.shape[1], int(labels_N.max()) + 1)
    hits_C = np.bincount(labels_N[taken_N == labels_N], minlength=num_classes)
    rows_C = np.bincount(labels_N, minlength=num_classes) + np.bincount(taken_N, minlength=num_classes)
    there_C = rows_C > 0
    return float(np.mean(2 * hits_C[there_C] / rows_C[there_C]))


def cross_entropy(outputs_NC: NDArray[Any], labels_N: NDArray[np.integer[Any]]) -> Floats:
    """-log softmax(outputs)[label] in nats; lower is better.

    Raises:
        EngineError: as `accuracy`, or a label that has no output.
    """
    _check_classes(outputs_NC, labels_N)
    if labels_N.size and not 0 <= labels_N.min() <= labels_N.max() < outputs_NC.shape[1]:
        raise EngineError(
            f"the engine's {outputs_NC.shape[1]} outputs a row tell labels 0 to {outputs_NC.shape[1] - 1}, "
            f"but the labels go from {labels_N.min()} to {labels_N.max()}"
        )
    shifted_NC = outputs_NC - outputs_NC.max(axis=1, keepdims=True).astype(np.float64)
    of_label_N = np.take_along_axis(shifted_NC, labels_N[:, None], axis=1)[:, 0]
    scores_N: Floats = np.log(np.exp(shifted_NC).sum(axis=1)) - of_label_N
    return scores_N


def squared_error(outputs_NK: NDArray[Any], targets_NK: NDArray[Any]) -> Floats:
    """Mean over a row's outputs of (output - target)^2; lower is better.

    Raises:
        EngineError: outputs of another shape than the targets, or not finite.
    """
    return _mean_of_row(np.square(_differences(outputs_NK, targets_NK)))


def absolute_error(outputs_NK: NDArray[Any], targets_NK: NDArray[Any]) -> Floats:
    """Mean over a row's outputs of |output - target|, in the unit of the targets; lower is better.

    Raises:
        EngineError: as `squared_error`.
    """
    return _mean_of_row(np.abs(_differences(outputs_NK, targets_NK)))


def cosine_similarity(outputs_NK: NDArray[Any], targets_NK: NDArray[Any]) -> Floats:
    """Cosine of the angle between a row's outputs and its targets, in [-1, 1].

    A row of zeros has no direction: it scores 1 against zeros and 0 against anything else.

    Raises:
        EngineError: as `squared_error`.
    """
    _check_like_targets(outputs_NK, targets_NK)
    outputs_NK, targets_NK = _unit(outputs_NK), _unit(targets_NK)
    both_zero_N = ~outputs_NK.any(axis=1) & ~targets_NK.any(axis=1)
    scores_N: Floats = np.where(both_zero_N, 1.0, (outputs_NK * targets_NK).sum(axis=1).clip(-1, 1))
    return scores_N


def agreement(outputs_NK: NDArray[Any], targets_NK: NDArray[Any]) -> Floats:
    """1 where the largest of a row's outputs is in the same place as the largest of its targets, else 0.

    Raises:
        EngineError: as `squared_error`.
    """
    _check_like_targets(outputs_NK, targets_NK)
    scores_N: Floats = (_flat(outputs_NK).argmax(axis=1) == _flat(targets_NK).argmax(axis=1)).astype(np.float64)
    return scores_N


def spearman(outputs_N: NDArray[Any], targets_N: NDArray[Any]) -> float:
    """Spearman's rank correlation of one output a row with the targets, in [-1, 1]; ties get their mean rank.

    Outputs that are all the same tell no order and score 0.

    Args:
        outputs_N: (N,) or (N, 1).
        targets_N: (N,) or (N, 1).

    Raises:
        EngineError: other than one output and one target a row, outputs that are not finite, or targets that are all
            the same and so have no order.
    """
    if outputs_N.size != len(outputs_N) or targets_N.size != len(targets_N) or len(outputs_N) != len(targets_N):
        raise EngineError(
            f"spearman compares one output a row with one target, got outputs {outputs_N.shape} and targets "
            f"{targets_N.shape}"
        )
    _check_finite(outputs_N)
    outputs_N, targets_N = _ranks(outputs_N.reshape(-1)), _ranks(targets_N.reshape(-1))
    if not targets_N.any():
        raise EngineError(f"spearman needs targets that differ, got {len(targets_N)} equal ones")
    if not outputs_N.any():
        return 0.0
    return float(outputs_N @ targets_N / np.sqrt((outputs_N @ outputs_N) * (targets_N @ targets_N)))


def _check_classes(outputs_NC: NDArray[Any], labels_N: NDArray[np.integer[Any]]) -> None:
    if outputs_NC.ndim != 2 or len(outputs_NC) != len(labels_N):
        wanted = f"({len(labels_N)}, classes)"
        raise EngineError(f"the engine's outputs must have the shape {wanted} to be classified, got {outputs_NC.shape}")
    _check_finite(outputs_NC)


def _check_like_targets(outputs: NDArray[Any], targets: NDArray[Any]) -> None:
    if outputs.shape != targets.shape:
        raise EngineError(
            f"the engine's outputs must have the shape of the targets {targets.shape}, got {outputs.shape}"
        )
    _check_finite(outputs)


def _check_finite(outputs: NDArray[Any]) -> None:
    broken = int((~np.isfinite(_flat(outputs))).any(axis=1).sum())
    if broken:
        raise EngineError(f"the engine gave NaN or infinite outputs for {broken} of {len(outputs)} rows")


def _flat(rows: NDArray[Any]) -> NDArray[Any]:
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _differences(outputs: NDArray[Any], targets: NDArray[Any]) -> Floats:
    _check_like_targets(outputs, targets)
    differences: Floats = outputs.astype(np.float64) - targets
    return differences


def _mean_of_row(values: Floats) -> Floats:
    means_N: Floats = _flat(values).mean(axis=1)
    return means_N


def _unit(rows: NDArray[Any]) -> Floats:
    """Rows as vectors of length 1; zeros stay zeros."""
    rows_NK = _flat(rows).astype(np.float64)
    # Divided by the largest value first, so that no square over- or underflows.
    largest_N1 = np.abs(rows_NK).max(axis=1, keepdims=True, initial=0.0)
    rows_NK = rows_NK / np.where(largest_N1 > 0, largest_N1, 1.0)
    length_N1 = np.linalg.norm(rows_NK, axis=1, keepdims=True)
    return rows_NK / np.where(length_N1 > 0, length_N1, 1.0)


def _ranks(values_N: NDArray[Any]) -> Floats:
    """Ranks minus their mean; equal values share the mean of their places."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return middle[place_N] - (len(values_N) + 1) / 2
