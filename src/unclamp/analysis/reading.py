"""One object of a JSON file, read value by value and checked: what came is said with its key.

For data that unclamp itself wrote, by this version or an earlier one: keys may be missing, and
there may be others. Numbers that JSON does not have are null (`unclamp.files`); earlier versions
wrote some of them as the text "inf", "-inf" or "nan".
"""

import math
from collections.abc import Mapping
from typing import NoReturn, TypeVar

from unclamp.errors import AnalysisError

T = TypeVar("T", bound=str)
_NUMBERS_AS_TEXT = ("inf", "-inf", "nan")


class Reading:
    """An object's values by key.

    A method's `default` is for a key that is missing; without one that is an error.

    Args:
        data: What JSON gave.
        what: What it is, for errors.

    Raises:
        AnalysisError: It is no object; from the methods: a value of another type.
    """

    def __init__(self, data: object, what: str) -> None:
        if not isinstance(data, Mapping):
            raise AnalysisError(f"expected an object for {what}, got {data!r}")
        self._data: Mapping[object, object] = data
        self._what = what

    def has(self, key: str) -> bool:
        """Whether there is something under a key."""
        return self._data.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._get(key, default)
        return value if isinstance(value, str) else self._refuse(key, "a text", value)

    def maybe_text(self, key: str) -> str | None:
        """Return a text, None if it is null or missing."""
        return self.text(key) if self.has(key) else None

    def choice(self, key: str, options: tuple[T, ...], default: T | None = None) -> T:
        """Return one of some texts."""
        value = self._get(key, default)
        found = next((option for option in options if option == value), None)
        return self._refuse(key, f"one of {list(options)}", value) if found is None else found

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(key, "a whole number", value)
        return value

    def maybe_whole(self, key: str) -> int | None:
        """Return a whole number, None if it is null or missing."""
        return self.whole(key) if self.has(key) else None

    def number(self, key: str, default: float | None = None, *, null: float = math.nan) -> float:
        """Return a number; `null` where JSON had none for it."""
        return self._number(key, self._get(key, default), null)

    def maybe_number(self, key: str) -> float | None:
        """Return a number, None if it is null or missing."""
        return self.number(key) if self.has(key) else None

    def maybe_flag(self, key: str) -> bool | None:
        """Return a truth value, None if it is null or missing."""
        value = self._data.get(key)
        if value is None or isinstance(value, bool):
            return value
        self._refuse(key, "true or false", value)

    def items(self, key: str) -> list[object]:
        """Return a list of anything, empty if missing."""
        values = self._data.get(key, [])
        is_list = isinstance(values, list | tuple)
        return list(values) if is_list else self._refuse(key, "a list", values)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty if missing."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            self._refuse(key, "a list of texts", values)
        return tuple(str(value) for value in values)

    def numbers(self, key: str) -> dict[str, float]:
        """Return an object of numbers, empty if missing."""
        found = Reading(self._data.get(key, {}), f"{key} of {self._what}")
        return {str(name): found._number(str(name), v, math.nan) for name, v in found._data.items()}

    def item(self, key: str) -> object:
        """Return what is under a key, whatever it is."""
        return self._get(key, None)

    def _get(self, key: str, default: object) -> object:
        value = self._data.get(key, default)
        if value is None and key not in self._data:
            raise AnalysisError(f"expected {key!r} in {self._what}, but it is missing")
        return value

    def _number(self, key: str, value: object, null: float) -> float:
        if value is None:
            return null
        if value in _NUMBERS_AS_TEXT:
            return float(str(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self._refuse(key, "a number", value)
        return float(value)

    def _refuse(self, key: str, expected: str, value: object) -> NoReturn:
        raise AnalysisError(f"expected {expected} for {key!r} of {self._what}, got {value!r}")
