"""Plain facts that every report shows alike: the machine, and figures as strict JSON."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hasten.reporting import units

Kind = typing.TypeVar("Kind")


def machine_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the machine, flat, with units; what is unknown is left out."""
    shown = []
    for name, value in facts.items():
        if value is None or value in ("", [], ()):
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


def restored(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A dataclass from its JSON form, the inverse of `finite`: a null where a figure has to be is an infinite one."""
    hints = typing.get_type_hints(kind)
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _restored(hints[name], value) for name, value in values.items() if name in known})


def _restored(hint: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _restored(next(each for each in inner if each is not type(None)), value)
    if is_dataclass(hint) and isinstance(hint, type):
        return restored(hint, value)
    if hint is float:
        return math.inf if value is None else float(value)
    if isinstance(value, Mapping) and inner:
        return {name: _restored(inner[1], each) for name, each in value.items()}
    if isinstance(value, list) and inner:
        return tuple(_restored(inner[0], each) for each in value)
    return value
