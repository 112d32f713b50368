"""Rows and modules as a notebook has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.core.construct import construct
from hasten.core.interfaces import DataSource, Table
from hasten.core.recipe import Composer
from hasten.notebook import rows


@pytest.fixture
def images() -> tuple[Any, Any]:
    """Thirty rows (3, 4, 4) of three classes."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(30, 3, 4, 4)).astype(np.float32), np.arange(30) % 3


@pytest.fixture
def read_again(hydra: None, tmp_path: Path) -> Any:
    """What the overrides read that rows were kept as."""

    def read(data: Any) -> Table:
        section = Composer.of(rows.kept(data, tmp_path / "it's" / "given")).compose().section("data")
        source = construct(section, "data")
        assert isinstance(source, DataSource)
        return source.load()

    return read
