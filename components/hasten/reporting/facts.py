"""Plain facts that every report shows alike: the machine, and figures as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hasten.reporting import units


def machine_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the machine, flat, with units; what is unknown is left out."""
    shown = []
    for name, value in facts.items():
        if value is None or value == "" or value == []:
            continue
        title = name.removesuffix("_bytes").replace("_", " ")
        if name.endswith("_bytes"):
            shown.append((title, units.size(value)))
        elif isinstance(value, Mapping):
            shown += [(f"{title}: {key}", text) for key, text in machine_facts(value)]
        elif isinstance(value, list | tuple):
            shown.append((title, ", ".join(str(item) for item in value)))
        else:
            shown.append((title, str(value)))
    return shown


def finite(value: Any) -> Any:
    """Plain lists and mappings, in which a figure that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
