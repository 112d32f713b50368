"""Some of the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks


@dataclass(frozen=True, kw_only=True)
class Select(Transform):
    """Keeps these columns, in this order: the order in which a model of several inputs takes them.

    Attributes:
        columns: names; all others are left out.
    """

    columns: Annotated[tuple[str, ...], MinLen(1)]

    def __call__(self, columns: Columns) -> Columns:
        return {name: checks.column(columns, name, self) for name in self.columns}
