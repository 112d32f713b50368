from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hasten.core.trial import Trial

MakeTrial = Callable[..., Trial]


@pytest.fixture
def trial() -> MakeTrial:
    """Makes a trial of which only what matters has to be said; accepted ones hold their constraints."""

    def make(number: int, **values: Any) -> Trial:
        verdict = values.get("verdict", "accepted")
        filled: dict[str, Any] = {
            "parent": 0 if number else None,
            "overrides": (),
            "edit": (),
            "strategy": "baseline",
            "bottleneck": "",
            "reason": "",
            "holds": verdict == "accepted",
            "verdict": verdict,
            **values,
        }
        return Trial(number=number, **filled)

    return make
