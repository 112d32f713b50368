"""Sizes that models are constructed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge

Size = Annotated[int, Ge(1)]


def check_input_shape(model: str, input_shape: Sequence[int], *axes: str) -> None:
    """Holds the shape of a row against the axes that a model is made for.

    Raises:
        ValueError: it has another number of axes, or one of size 0.
    """
    if len(input_shape) != len(axes) or min(input_shape) < 1:
        wanted = f"({', '.join(axes)}{',' * (len(axes) == 1)})"
        raise ValueError(f"{model} needs rows of input_shape {wanted}, got {tuple(input_shape)}")


def check_sizes(model: str, **sizes: int | Sequence[int] | None) -> None:
    """Holds sizes, and each of a list of them, against 1.

    Raises:
        ValueError: one is below 1, an empty list, or null although the data does not say it.
    """
    for name, value in sizes.items():
        if value is None:
            raise ValueError(f"{model}: {name} is null, and the data and the task don't say it")
        values = [value] if isinstance(value, int) else list(value)
        if not values or min(values) < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {value if isinstance(value, int) else values}")
