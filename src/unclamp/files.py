"""Files that appear whole or not at all, and the one dialect of JSON that stands in them.

JSON has no number for NaN and Inf, and what many parsers take for them, others refuse: here they
are null. Whoever has to tell them apart says so in a key of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from typing_extensions import Buffer

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
"""What JSON can hold."""


def write_atomically(path: Path, data: bytes | Buffer) -> None:
    """Make `path` appear with all of `data`, safe from a crash, or not at all.

    What was at `path` before is replaced at once: a reader sees the one or the other. Processes
    that write the same file do not disturb each other; the last one's data stay.

    Raises:
        OSError: The disk refuses; what was there before is still there.
    """
    # A name for each process, since two may explain the same spike or write the same page.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, data: object) -> None:
    """Write `to_json(data)` and a line's end atomically.

    Raises:
        OSError: As `write_atomically`.
        TypeError: As `to_json`.
    """
    write_atomically(path, f"{to_json(data)}\n".encode())


def to_json(data: object, *, indent: int | None = 1) -> str:
    """Return data as JSON that every parser reads; NaN and Inf become null.

    Args:
        data: As `strict`.
        indent: Spaces a level; None puts all into one line without spaces.

    Raises:
        TypeError: As `strict`.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(strict(data), indent=indent, separators=separators, allow_nan=False)


@overload
def strict(data: Mapping[Any, object]) -> dict[str, Json]: ...
@overload
def strict(data: object) -> Json: ...
def strict(data: object) -> Json:
    """Return data as strict JSON holds it: NaN and Inf as None, tuples as lists, keys as text.

    Raises:
        TypeError: It holds something else than mappings, lists, tuples, text, numbers, booleans
            and None.
    """
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else None
    if data is None or isinstance(data, str | int):  # a bool is an int
        return data
    if isinstance(data, Mapping):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [strict(value) for value in data]
    raise TypeError(f"expected data that JSON can hold, got {type(data).__name__}: {data!r}")
