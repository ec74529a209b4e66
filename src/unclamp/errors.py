"""Every error a user can meet.

UnclampError
├── RecipeError        a recipe that makes no sense, or cannot be read
├── ConvertError       a model that cannot be converted or reverted as asked
├── UnsupportedError   a request this build, device or dtype cannot serve
├── RunLogError        a folder that is not the run log it should be
├── AnalysisError      a curve that cannot be read or judged as asked
├── ReplayError        steps that cannot be replayed, or a spike that cannot be explained
└── StudyError         a study whose configuration or data cannot be used

A message says what was expected, what came, and what to do about it; where a name is unknown,
also the nearest that is known.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T", bound=Callable[..., Any])


class UnclampError(Exception):
    """Base of all errors raised for a reason the user can mend."""


class RecipeError(UnclampError, ValueError):
    """A recipe names something unknown, or a combination that makes no sense."""


class ConvertError(UnclampError, ValueError):
    """A model cannot be converted or reverted as asked; it is left unchanged."""


class UnsupportedError(UnclampError, NotImplementedError):
    """This build, device or dtype cannot do what was asked."""


class RunLogError(UnclampError, ValueError):
    """A folder is not a run log, is another version's, or is already in use."""


class ReplayError(UnclampError, ValueError):
    """Snapshot, code or batches for a replay are missing, or do not belong together."""


class StudyError(UnclampError, ValueError):
    """A study's configuration, text or output folder cannot be used."""


class AnalysisError(UnclampError, ValueError):
    """A file holds no curve or explanation that can be read; or a definition is unknown."""


class UnclampWarning(UserWarning):
    """Something was left out or did not match; the work goes on."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" for the known name that is nearest; "" where none is near.

    Upper and lower case count as one.
    """
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def naming_arguments(function: _T) -> _T:
    """Have a function, or a class's constructor, say which argument a misspelt one is near to.

    What it raises is the TypeError that Python raises without it, in more words.
    """
    if isinstance(function, type):
        function.__init__ = _naming(function.__init__, function.__qualname__)
        return function  # pyright: ignore[reportReturnType]
    return _naming(function, function.__qualname__.removesuffix(".__init__"))  # pyright: ignore[reportReturnType]


def _naming(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [each for each in known if each != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        for each in named:
            if each not in known:
                raise TypeError(
                    f"{name}() has no argument {each!r}: expected one of {', '.join(known)}"
                    f"{did_you_mean(each, known)}"
                )
        return function(*args, **named)

    return checked


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, without its stop; its class if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
