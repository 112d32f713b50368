"""What becomes of a shard's rows, whichever process does it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hasten.artefacts.rows import apply, as_inputs
from hasten.core.interfaces import Transform
from hasten.data.arrays import ArrayFile
from hasten.data.pieces import Shard
from hasten.data.transforms.checks import numbered_from


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each shard.

    Attributes:
        transforms: fitted, in their order.
        as_inputs: whether what they give is turned into the types that models take.
        files: split -> file of each column.
    """

    transforms: tuple[Transform, ...]
    as_inputs: bool
    files: Mapping[str, tuple[ArrayFile, ...]]

    def make(self, shard: Shard) -> str:
        """Transforms the rows of a shard and writes them to their places.

        Returns:
            SHA-256 of what was written, split by split, column by column.

        Raises:
            ConfigError: a transform refuses the rows, or makes others of them than of the first.
        """
        digest = hashlib.sha256()
        for split, part in shard.parts.items():
            with numbered_from(part.first):
                columns = apply(self.transforms, part.columns)
            if self.as_inputs:
                columns = as_inputs(columns)
            for file in self.files[split]:
                values = file.checked(columns[file.column])
                file.write(part.first, values)
                digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def digest(self, spans: Mapping[str, tuple[int, int]]) -> str:
        """SHA-256 of what lies in the places of a shard, as `make` reckons it."""
        digest = hashlib.sha256()
        for split, (first, end) in spans.items():
            for file in self.files[split]:
                for content in file.content(first, end):
                    digest.update(content)
        return digest.hexdigest()
