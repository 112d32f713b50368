"""Silences libraries whose own code is what they warn of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced() -> Iterator[None]:
    """No warnings and no log lines, neither of PyTorch's export nor of what is imported or called inside."""
    from hasten.artefacts.capture import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
