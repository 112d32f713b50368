"""How good an order of rows is as a shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """What is left of the order of the file, and what it does to a step. Any property of rows may be sorted in a file.

    Attributes:
        distance: mean distance in the file of rows that follow one another, as a multiple of a uniform permutation's;
            1 of that, 3 / (N + 1) of the file's own order, and near 0 wherever neighbours stay together.
        rank_correlation: of the place in the order and the place in the file, in [-1, 1] (Spearman 1904); 0 of a
            uniform permutation, with a standard deviation of 1 / sqrt(N - 1), and 1 of the file's own order.
        batch_variance: how much the shares of labels differ between batches, as a multiple of what they do in batches
            of rows drawn at random without replacement: the design effect of a sample (Kish 1965). It multiplies that
            part of the noise of a step's gradient which comes from what is sorted in the file; 1 of a uniform
            permutation, B (N - 1) / (N - B) where every one of the batches of B rows holds a single label. Xu et al.
            2022 ("CorgiPile") bound the convergence of SGD on blocks by this ratio for the gradients of blocks.
    """

    distance: float
    rank_correlation: float
    batch_variance: float


def shuffle_quality(order: NDArray[np.int64], labels: NDArray[Any], batch_size: int) -> ShuffleQuality:
    """Of an order in which all N rows are visited.

    Args:
        order: (N,) row numbers, a permutation; N at least 2.
        labels: (N,) of the rows, as the file has them.
        batch_size: B, less than N; what is left over of the last batch does not count.
    """
    num_rows = len(order)
    return ShuffleQuality(
        distance=float(np.abs(np.diff(order)).mean() / ((num_rows + 1) / 3)),
        rank_correlation=float(np.corrcoef(np.arange(num_rows), order)[0, 1]),
        batch_variance=_batch_variance(labels[order], batch_size),
    )


def _batch_variance(labels: NDArray[Any], batch_size: int) -> float:
    """Of rows in the order in which they come: variance of shares within batches over the one expected at random.

    Of a label that a share p of the N rows has, batches of B random rows have shares that vary by
    p (1 - p) / B * (N - B) / (N - 1), the hypergeometric variance. Both sides are summed over the labels, weighted by
    nothing: each is the squared distance between a batch's vector of shares and that of all rows.
    """
    names, numbers = np.unique(labels, return_inverse=True)
    num_rows, num_batches = len(labels), len(labels) // batch_size
    places = np.arange(num_batches).repeat(batch_size) * len(names) + numbers[: num_batches * batch_size]
    counts = np.bincount(places, minlength=num_batches * len(names)).reshape(num_batches, len(names))
    shares = np.bincount(numbers) / num_rows
    found = np.square(counts / batch_size - shares).sum(1).mean()
    expected = (shares * (1 - shares)).sum() / batch_size * (num_rows - batch_size) / (num_rows - 1)
    return float(found / expected) if expected else 1.0
