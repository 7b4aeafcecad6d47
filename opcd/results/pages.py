"""Pages of results: each is one HTML file that needs no network.

A template extends `layout.html.j2`, which has the style, and imports tables from `parts.html.j2`.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opcd.runtime.output import shown


def render(template: Path, **values: Any) -> str:
    """Render a template. Values are escaped, except `Markup`."""

    def finalize(value: Any) -> Any:
        """Escape characters that a browser hides or reverses."""
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=finalize)
    return environment.get_template(template.name).render(**values)
