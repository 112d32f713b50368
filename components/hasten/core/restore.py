"""From plain values, as JSON has them, back to the dataclasses that they were."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from hasten.core.errors import HastenError
from hasten.core.trial import Result, TrainingResult, Trial


def restore(kind: Any, value: Any) -> Any:
    """The value as its type has it: what is not there gets its default, a figure that is null is no number.

    Args:
        kind: a dataclass, or what stands in the annotations of one.

    Raises:
        HastenError: a part is missing that has no default.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else restore(next(each for each in inner if each is not type(None)), value)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        given = {each.name: restore(hints[each.name], value[each.name]) for each in fields(kind) if each.name in value}
        try:
            return kind(**given)  # type: ignore[operator]
        except TypeError as error:
            raise HastenError(f"this is no whole {getattr(kind, '__name__', kind)}: {error}") from error
    if origin is tuple:
        return tuple(restore(inner[0], each) for each in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: restore(inner[1], each) for name, each in value.items()}
    if kind is float:
        return float("nan") if value is None else float(value)
    return value


def trial(written: Mapping[str, Any]) -> Trial:
    """What `Trial.to_dict` gave."""
    found: Trial = restore(Trial, written)
    return found


def result(summary: Mapping[str, Any]) -> Result | TrainingResult:
    """What `summary.json` says."""
    kind = TrainingResult if summary.get("optimize") == "training" else Result
    found: Result | TrainingResult = restore(kind, {**summary, "tracking_command": summary.get("tracking")})
    return found
