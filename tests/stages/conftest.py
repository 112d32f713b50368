"""What tests of stages share."""

from __future__ import annotations

import pytest

from hasten.stages.data import forget_fingerprints


@pytest.fixture(autouse=True)
def _reads_rows_anew() -> None:
    """Files of the same name in two tests are different rows."""
    forget_fingerprints()
