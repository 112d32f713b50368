"""Handwritten digits that scikit-learn brings along."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.core.interfaces import INPUT, DataSource, Table
from hasten.data.fingerprint import of_table


@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """1797 grey images of 8x8 pixels, (1797, 1, 8, 8) with values 0 to 16, in 10 classes (Alpaydin and Kaynak 1998)."""

    def fingerprint(self) -> str:
        return of_table(self.load())

    def load(self) -> Table:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images[:, np.newaxis].astype(np.float32)
        return Table(inputs={INPUT: images}, targets=digits.target.astype(np.int64))
