"""From a config node to the component that it declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from hasten.core.construct import STAGE_KEYS, arguments, construct
from hasten.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Step:
    sizes: tuple[Any, ...] = ()
    names: Any = None


NODE = {"_target_": f"{__name__}.Step", "sizes": [1, [2, 3]], "names": {"a": "b"}}


def test_lists_become_tuples_however_deep_and_mappings_stay() -> None:
    assert construct(NODE, "data") == Step(sizes=(1, (2, 3)), names={"a": "b"})


def test_what_the_stage_reads_is_no_argument() -> None:
    assert construct({**NODE, **dict.fromkeys(STAGE_KEYS, "anything")}, "data") == construct(NODE, "data")
    assert arguments({**NODE, "transforms": [], "metrics": {}}) == {"sizes": [1, [2, 3]], "names": {"a": "b"}}


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"_target_": "Step"}, r"^data\._target_ must be a dotted path such as package\.module\.Class, got 'Step'$"),
        ({"_target_": "nowhere.Step"}, r"^data\._target_=nowhere\.Step does not import: "),
        ({**NODE, "size": 1}, r"^data: .*unexpected keyword argument 'size'"),
    ],
)
def test_a_node_that_declares_no_component_is_told_by_its_key(node: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        construct(node, "data")
