"""A column times a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks


@dataclass(frozen=True, kw_only=True)
class Scale(Transform):
    """values * factor + offset as float32, reckoned in double precision.

    Pixels of 0 to 255 become 0 to 1 with `factor: 0.00392156862745098`.
    """

    elementwise: ClassVar[bool] = True

    column: str
    factor: float = 1.0
    offset: float = 0.0

    def __call__(self, columns: Columns) -> Columns:
        values = checks.numbers(columns, self.column, self)
        scaled = np.empty(values.shape, dtype=np.float32)
        for part in checks.parts(values):
            scaled[part] = np.multiply(values[part], self.factor, dtype=np.float64) + self.offset
        return checks.replaced(columns, [self.column], {self.column: scaled}, self)
