"""No rows at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, DataSource, Table


@dataclass(frozen=True, kw_only=True)
class Noise(DataSource):
    """Made-up rows in the shape of real ones, to time a model before there is data. Nothing is learned or judged by it.

    Attributes:
        shape: of one row.
        rows: how many.
        dtype: `float32` for standard normal noise; `int64` for zeros and ones at random, which any vocabulary holds.
    """

    real: ClassVar[bool] = False

    shape: tuple[Annotated[int, Ge(1)], ...]
    rows: Annotated[int, Ge(1)] = 64
    dtype: Literal["float32", "int64"] = "float32"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"noise {self.rows} {tuple(self.shape)} {self.dtype}".encode()).hexdigest()

    def load(self) -> Table:
        if not self.shape:
            raise ConfigError("data.shape must have at least one axis, got []")
        generator = np.random.default_rng(0)
        size = (self.rows, *self.shape)
        noise = (
            generator.standard_normal(size, dtype=np.float32)
            if self.dtype == "float32"
            else generator.integers(0, 2, size)
        )
        return Table(
            inputs={INPUT: noise},
            targets=None,
            notes=("The rows are noise: they time the model and say nothing of its quality.",),
        )
