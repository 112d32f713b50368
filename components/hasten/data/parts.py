"""Which rows belong to which split, where a source comes with splits of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validate", "test")
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validate": ("validate", "validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Split -> how others write it, the first that is there counts."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is read, and for whom.

    Attributes:
        texts: split whose rows are read -> the splits that they are for, as `Table.parts` has them: `validate+test`.
        notes: one for each split that has no rows of its own.
    """

    texts: Mapping[str, str]
    notes: tuple[str, ...]

    def column(self, rows: Sequence[tuple[str, int]]) -> NDArray[Any] | None:
        """`Table.parts` of rows that come as (text, number of rows); None where all are for all splits."""
        if len(self.texts) < 2:
            return None
        return np.repeat([text for text, _ in rows], [count for _, count in rows])


def parts(given: Mapping[str, Hashable]) -> Parts:
    """Divides splits with the same rows between one another; a split without rows shares those of the one before it.

    Args:
        given: split -> what tells its rows from those of others; `train` at least.
    """
    owners: dict[str, str] = {}
    notes = []
    for place, split in enumerate(SPLITS):
        if split in given:
            owners[split] = next(other for other in SPLITS if other in given and given[other] == given[split])
        else:
            owners[split] = owners[SPLITS[place - 1]]
            notes.append(f"There are no rows for {split} alone: those for {owners[split]} are divided by data.split.")
    texts = {
        owner: "+".join(split for split in SPLITS if owners[split] == owner) for owner in dict.fromkeys(owners.values())
    }
    return Parts(texts=texts, notes=tuple(notes))


def spelt(names: Sequence[str]) -> dict[str, str]:
    """Split -> the name among these that stands for it, where there is one."""
    found = {split: next((name for name in spellings if name in names), None) for split, spellings in SPELLINGS.items()}
    return {split: name for split, name in found.items() if name is not None}
