"""What stdout shows where it cannot show every character: a pipe in ASCII, an old console.

Names of modules and files are the user's and may hold any character, so no command can do without.
"""

import codecs
import sys
from typing import TextIO

HANDLER = "unclamp.plain"
PLAIN = {"·": "-", "…": "~", "→": "->"}
"""What our own texts use; one letter for one where a column's width depends on it."""


def show_what_can_be_shown() -> None:
    """Have stdout and stderr write a character that their encoding lacks in others.

    Our own signs become the nearest in ASCII, and others escapes as JSON and TOML read them.
    """
    codecs.register_error(HANDLER, in_others)
    for stream in (sys.stdout, sys.stderr):
        if _is_narrow(stream):
            stream.reconfigure(errors=HANDLER)  # pyright: ignore[reportAttributeAccessIssue]


def in_others(error: UnicodeError) -> tuple[str, int]:
    """Return what to write in place of what `error` could not encode, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(each) or _escaped(each) for each in lacking), error.end


def _escaped(letter: str) -> str:
    """Return a letter as UTF-16 escapes, two of them beyond the first 65,536."""
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def _is_narrow(stream: TextIO | None) -> bool:
    encoding = getattr(stream, "encoding", None) or ""
    return hasattr(stream, "reconfigure") and not encoding.lower().startswith("utf")
