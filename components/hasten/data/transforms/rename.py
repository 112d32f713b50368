"""Other names for columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks


@dataclass(frozen=True, kw_only=True)
class Rename(Transform):
    """Gives columns the names by which a model of several inputs takes them; their order stays.

    Attributes:
        names: name -> new name; columns that are not in it keep theirs.
    """

    names: Mapping[str, str]

    def __call__(self, columns: Columns) -> Columns:
        for name in self.names:
            checks.column(columns, name, self)
        renamed = {self.names.get(name, name): values for name, values in columns.items()}
        if len(renamed) < len(columns):
            after = [self.names.get(name, name) for name in columns]
            twice = next(name for name in after if after.count(name) > 1)
            raise ConfigError(f"Rename.names gives two columns the name {twice} (data.transforms)")
        return renamed
