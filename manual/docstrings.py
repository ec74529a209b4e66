"""Reads docstrings as Markdown where they were written as text: the extension of griffe.

griffe calls the section of examples `Examples:`, and the docstrings call it `Example:`. The powers
of `[2**-126, 2**126]` are no bold print, and the part of `explain-<onset>.json` is no HTML.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_CODE = re.compile(r"(`+[^`]*`+)")
_POWER = re.compile(r"(?<=[\w)])\*\*(?=[-\w(])")
_PART = re.compile(r"<(?=\w)")


class Docstrings(griffe.Extension):
    """Rewrites docstrings while the sources are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with its example under griffe's heading and its signs kept as signs."""
    lines, in_example = [], False
    for line in _EXAMPLE.sub(r"\1Examples:", text).split("\n"):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        lines.append(line if in_example else _signs(line))
    return "\n".join(lines)


def _signs(line: str) -> str:
    parts = _CODE.split(line)
    parts[::2] = [_PART.sub("&lt;", _POWER.sub(r"\*\*", part)) for part in parts[::2]]
    return "".join(parts)
