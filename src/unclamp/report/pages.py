"""Which files are pages that unclamp wrote, so that no one else's is replaced. Torch-free."""

from itertools import count
from pathlib import Path

from unclamp.errors import UnclampError

GENERATOR = "unclamp"
_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
_HEAD = 4096
"""Bytes from the beginning of a page within which its mark stands."""


def check_page(path: Path) -> None:
    """Refuse to replace a file that is no page of unclamp's.

    Raises:
        UnclampError: There is such a file.
    """
    if _is_foreign(path):
        raise UnclampError(
            f"{str(path)!r} is there already and is no page that unclamp wrote: give --out another "
            "file, or move that one"
        )


def free_page(path: Path) -> Path:
    """Return the path, with a number where another's file has that name: `compare-2.html`."""
    if not _is_foreign(path):
        return path
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(each for each in numbered if not _is_foreign(each))


def _is_foreign(path: Path) -> bool:
    """Return whether there is a file without the mark; one that cannot be read counts as one."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _MARK not in file.read(_HEAD)
    except OSError:
        return True
