"""Pages that hold everything and load nothing."""

from __future__ import annotations

from typing import Any


def page(template: str, **values: Any) -> str:
    """A template of this room with its values; texts are escaped, and a value that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hasten.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
