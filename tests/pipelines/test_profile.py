"""`hasten profile`: where the time of one recipe goes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hasten.core.trial import BOTTLENECKS

pytestmark = pytest.mark.slow


def operators(profile: dict[str, Any]) -> set[tuple[str, int, int]]:
    return {(group["kind"], group["calls"], group["flops"]) for group in profile["operators"]}


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_names_the_bottleneck_with_the_figures_that_say_so(hasten: Any, ran: Any, engine: str) -> None:
    done = hasten("profile", f"engine={engine}")
    assert done.code == 0, done.told
    assert sorted(path.name for path in done.folder.iterdir()) == ["profile.json", "roofline.png"]
    assert (done.folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    profile = json.loads((done.folder / "profile.json").read_text())
    assert profile["bottleneck"] in BOTTLENECKS
    assert sum(profile["shares"][name] for name in ("compute", "memory", "overhead")) == pytest.approx(1)
    assert profile["bottleneck"] in done.printed
    assert profile["evidence"]
    trial = ran.summary["trials"][engine == "onnxruntime"]
    assert profile["weight_bytes"] == trial["profile"]["weight_bytes"]
    assert operators(profile) == operators(trial["profile"])
