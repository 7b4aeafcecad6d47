"""Pages of results: one HTML file each, which needs no network.

A template extends `layout.html.j2`, which has the style of all pages, and imports tables from `parts.html.j2`.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opcd.runtime.output import shown


def _visible(value: Any) -> Any:
    """Text of others without characters that a browser hides or turns around."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else shown(value)


def render(template: Path, **values: Any) -> str:
    """The page of a template with these values, escaped but for what is `Markup`."""
    folders = [template.parent, Path(__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, finalize=_visible
    )
    return environment.get_template(template.name).render(**values)
