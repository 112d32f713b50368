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


def picture(title: str, svg: str) -> str:
    """A page with one figure. MLflow's UI shows pages where it would leave an SVG file blank."""
    from html import escape

    style = "body{margin:1rem;background:#fff}svg{width:100%;max-width:54rem;height:auto}"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{svg}\n</body></html>\n'
