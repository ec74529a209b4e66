"""Values that a study file gives, checked: of the right type and range, under a known key."""

from collections.abc import Mapping
from typing import Any

from unclamp.errors import RecipeError, StudyError
from unclamp.formats import unknown_name


def expect(value: object, kind: type[Any], what: str) -> Any:
    """Return a value of this type, or raise a StudyError."""
    if not isinstance(value, kind):
        raise StudyError(f"expected a {kind.__name__} for {what}, got {value!r}")
    return value


def number(value: object, kind: type[Any], what: str, *, low: int) -> Any:
    """Return a finite number of at least `low`, or raise a StudyError."""
    fits = isinstance(value, int | float if kind is float else int)
    if not fits or isinstance(value, bool) or not float("inf") > value >= low:  # pyright: ignore
        raise StudyError(f"expected {kind.__name__} >= {low} for {what}, got {value!r}")
    return kind(value)


def check_keys(what: str, data: Mapping[str, Any], known: list[str]) -> None:
    """Raise a StudyError for a key that is not known."""
    for key in data:
        if key not in known:
            raise unknown(f"key of the {what}", key, known)


def unknown(kind: str, name: str, known: list[str]) -> StudyError:
    """Return the error for a name that is not known."""
    error: RecipeError = unknown_name(kind, name, known)
    return StudyError(str(error))
