"""A template becomes a self-contained page, with style, colours and plotly in it: no network."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from unclamp.files import write_atomically


def render_page(template: str, path: Path, **shown: Any) -> Path:
    """Write a page of a template and return its path; replaces an older one at once.

    Args:
        template: Name of a file in `templates`.
        path: Of the page.
        shown: What the template shows; style, theme and plotly are given to it besides.

    Raises:
        OSError: The disk refuses.
    """
    page = (
        _environment()
        .get_template(template)
        .render(
            **shown,
            style=asset("style.css"),
            theme=asset("theme.js"),
            plotly_js=Markup(get_plotlyjs()),
        )
    )
    write_atomically(path, page.encode())
    return path


@cache
def _environment() -> jinja2.Environment:
    """Return what compiles each template once, which takes longer than to fill it in."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("unclamp.report"), autoescape=True, trim_blocks=True
    )


def asset(name: str) -> Markup:
    """Return the text of a file in `templates`, to stand in a page as it is."""
    text = files("unclamp.report").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(text)
