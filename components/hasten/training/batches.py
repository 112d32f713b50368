"""Batches out of rows, as a training step takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from hasten.artefacts.rows import take
from hasten.core.interfaces import Rows
from hasten.training.announced import Announced

Batch = tuple[Tensor, ...]
"""Inputs in the order of the signature, targets, and stored answers of a teacher where there are any; (B, ...) each."""


class Batches(Dataset[Batch]):
    """Rows that are indexed a whole batch at a time: one gather per column instead of Python per row.

    Columns may be mapped from files: a batch reads its own rows of them. They are gathered by NumPy, which is as fast
    as `torch.index_select` and seven times as fast as indexing a tensor with a list, and leaves torch's threads to the
    training step.

    Args:
        rows: as a model takes them, or as they are kept.
        answers: (N, *output_shape) of a teacher; None where there are none.
        numbers: (M,) of the rows that there are; None for all.
    """

    def __init__(
        self, rows: Rows, answers: NDArray[np.float32] | None = None, numbers: NDArray[np.int64] | None = None
    ) -> None:
        self.rows, self.answers, self._numbers = rows, answers, numbers

    def __len__(self) -> int:
        return len(self.rows if self._numbers is None else self._numbers)

    def __getitems__(self, numbers: NDArray[np.int64]) -> Batch:
        if self._numbers is not None:
            numbers = self._numbers[numbers]
        taken = take(self.rows, numbers)
        answers = () if self.answers is None else (self.answers[numbers],)
        return tuple(map(torch.from_numpy, (*taken.inputs.values(), taken.targets, *answers)))

    def announced(self) -> Callable[[NDArray[np.int64]], None]:
        """Tells the system which rows are wanted soon, where they are mapped from files."""
        announced, numbers_of = Announced.of(self.columns), self._numbers
        return lambda numbers: announced(numbers if numbers_of is None else numbers_of[numbers])

    def part(self, numbers: NDArray[np.int64]) -> Batches:
        """These rows alone, of all that there are; nothing is copied."""
        return Batches(self.rows, self.answers, numbers)

    @property
    def columns(self) -> tuple[NDArray[np.generic], ...]:
        """Everything that a batch is gathered from (N, ...)."""
        answers = () if self.answers is None else (self.answers,)
        return (*self.rows.inputs.values(), self.rows.targets, *answers)


class RowByRow(Dataset[Batch]):
    """The usual way: each row is fetched and transformed by itself, and `collate` makes batches of them."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        return tuple(column[0] for column in self._batches.__getitems__(np.array([number])))


def collate(rows: Sequence[Batch]) -> Batch:
    """A batch of rows."""
    return tuple(default_collate(list(rows)))


def as_is(batch: Batch) -> Batch:
    """Collation of what is a batch already."""
    return batch
