"""The text of somebody else's file, whatever encoded or compressed it.

What the text says is for `curve_files` and `console_files`.
"""

import codecs
import gzip
import sys
import zlib
from pathlib import Path

from unclamp.errors import AnalysisError

STANDARD_INPUT = "-"
"""The path that stands for what comes in through a pipe."""
_GZIP = b"\x1f\x8b"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"),
          (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # fmt: skip
"""Longer marks before those that they begin with."""
_LOOKED_AT = 4096


def read_text(path: Path) -> str:
    """Return the text of a file, or of the standard input if the path is "-".

    Raises:
        AnalysisError: It cannot be read, or is no text.
    """
    try:
        if str(path) == STANDARD_INPUT:
            return to_text(sys.stdin.buffer.read(), path)
        return to_text(path.read_bytes(), path)
    except OSError as error:
        raise AnalysisError(f"cannot read {path}: {error}") from error


def to_text(data: bytes, path: Path) -> str:
    """Return bytes as text; `path` is what errors call them.

    gzip is unpacked, as far as it goes where a running program has not closed it. A byte-order
    mark decides the encoding; without one UTF-16 is known by its zeros, as PowerShell's `>` writes
    it, and all else is UTF-8. What is not valid there, such as the blocks of a progress bar from a
    Windows console, is replaced, since names and numbers are ASCII.

    Raises:
        AnalysisError: It holds zeros, as no text does; or broken gzip.
    """
    if data.startswith(_GZIP):
        data = _unpacked(data, path)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), _guess(data))
    text = data.decode(encoding, errors="replace").removeprefix("\ufeff")
    if "\0" in text or (encoding != "utf-8" and not _is_mostly_ascii(text)):
        raise AnalysisError(
            f"{path} is no text; expected CSV, JSON lines, trainer_state.json, a console log or "
            "an event file"
        )
    return text


def _is_mostly_ascii(text: str) -> bool:
    """Return whether names and numbers are there; bytes that are no text are odd letters."""
    begin = text[:_LOOKED_AT]
    return 2 * sum(letter.isascii() for letter in begin) >= len(begin)


def _guess(data: bytes) -> str:
    """Return UTF-16 where every second byte of the beginning is a zero, UTF-8 elsewhere."""
    begin = data[:_LOOKED_AT]
    even, odd = begin[::2], begin[1::2]
    if len(begin) < 4:
        return "utf-8"
    if odd.count(0) > 0.8 * len(odd) and not even.count(0):
        return "utf-16-le"
    if even.count(0) > 0.8 * len(even) and not odd.count(0):
        return "utf-16-be"
    return "utf-8"


def _unpacked(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        return zlib.decompressobj(wbits=31).decompress(data)  # still being written
    except (OSError, zlib.error) as error:
        raise AnalysisError(f"cannot unpack {path}: {error}") from error
