"""Several columns of numbers as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, Columns, Transform
from hasten.data.transforms import checks


@dataclass(frozen=True, kw_only=True)
class Stack(Transform):
    """Joins columns (B,) or (B, k) of numbers, in this order, to one column (B, features) of float32.

    That is what a table of numbers needs, whose features are columns of their own.

    Attributes:
        columns: names of the columns, which the new one replaces.
        name: of the new column.
    """

    columns: Annotated[tuple[str, ...], MinLen(1)]
    name: str = INPUT

    def __call__(self, columns: Columns) -> Columns:
        features = [self._features(columns, name) for name in self.columns]
        return checks.replaced(columns, self.columns, {self.name: np.concatenate(features, axis=1)}, self)

    def _features(self, columns: Columns, name: str) -> NDArray[np.float32]:
        values: NDArray[Any] = checks.numbers(columns, name, self)
        if values.ndim > 2:
            raise ConfigError(
                f"Stack takes one number or one list of numbers a row, got {name} of shape {values.shape}"
            )
        with np.errstate(over="ignore"):
            features = values.reshape(len(values), -1).astype(np.float32)
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise ConfigError(
                f"Stack wants finite numbers in the column {name}, got NaN, infinite or too large ones in "
                f"{len(broken)} of {len(values)} rows, the first in row {checks.row_number(int(broken[0]))}"
            )
        return features
