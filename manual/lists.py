"""Lets a list follow a paragraph's line at once, as CommonMark and every viewer have it.

Python-Markdown, which MkDocs renders with, wants an empty line between the two.
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_FENCE = re.compile(r" *(```|~~~)")
_ITEM = re.compile(r"(?:[-*]|1\.) ")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the empty lines in."""
    lines: list[str] = []
    fenced = in_list = False
    for line in markdown.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and _ITEM.match(line):
            if lines and lines[-1].strip() and not in_list:
                lines.append("")
            in_list = True
        elif not line.strip():
            in_list = False
        lines.append(line)
    return "\n".join(lines)
