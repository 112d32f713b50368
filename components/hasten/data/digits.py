"""Handwritten digits that scikit-learn brings along."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.core.interfaces import DataSource, Table
from hasten.data.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """1797 grey images of 8x8 pixels, (1797, 1, 8, 8) with values 0 to 16, in 10 classes (Alpaydin and Kaynak 1998)."""

    def fingerprint(self) -> str:
        table = self.load()
        return fingerprint(table.inputs, table.targets)

    def load(self) -> Table:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return Table(inputs=digits.images[:, np.newaxis].astype(np.float32), targets=digits.target.astype(np.int64))
