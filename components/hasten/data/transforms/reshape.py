"""Another shape for the rows of a column."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks


@dataclass(frozen=True, kw_only=True)
class Reshape(Transform):
    """Gives each row of a column another shape, its values in the same order, the last axis fastest.

    Attributes:
        shape: of one row; one axis may be -1, what the others leave over.
    """

    column: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.shape.count(-1) > 1 or any(size < 1 and size != -1 for size in self.shape):
            raise ConfigError(
                f"shape must hold sizes of at least 1, one of them may be -1, got {list(self.shape)} (Reshape.shape)"
            )

    def __call__(self, columns: Columns) -> Columns:
        values = checks.numbers(columns, self.column, self)
        available = math.prod(values.shape[1:])
        wanted = math.prod(size for size in self.shape if size != -1)
        if available % wanted if -1 in self.shape else available != wanted:
            raise ConfigError(
                f"Reshape can't give rows of {self.column} the shape {list(self.shape)}: they have the shape "
                f"{list(values.shape[1:])} (data.transforms)"
            )
        shape = tuple(available // wanted if size == -1 else size for size in self.shape)
        return checks.replaced(columns, [self.column], {self.column: values.reshape(len(values), *shape)}, self)
