"""Object storage that says in a sentence why it does not answer, whatever package asks it.

Each storage has errors of its own: of botocore, aiohttp, google.auth and others. What is asked of
a file system that `told` made, and of its files, raises `StorageError` in their place: on opening
a run, and later, when credentials have expired or a connection is gone. That something is not
there, or is a folder, is an answer and stays what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from unclamp.errors import RunLogError

_ANSWERS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    MemoryError,
    RunLogError,
)


class StorageError(RunLogError, OSError):
    """A storage did not give what was asked of it: the message names the URL and the cause."""


@contextmanager
def telling(url: str) -> Iterator[None]:
    """While entered, errors of a storage become a `StorageError` about `url`."""
    try:
        yield
    except _ANSWERS:
        raise
    except ImportError as error:
        raise RunLogError(
            f"{url} cannot be read, because a package is missing ({error}): "
            "pip install 'unclamp[s3]' installs what s3:// needs, gcsfs is for gs://, adlfs for az://"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{url} cannot be read: {reason.rstrip('.')}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    words = f"{type(error).__name__} {error}".lower()
    if "expired" in words:
        return ": get new credentials and ask again"
    if "credentials" not in words:
        return ""
    return (
        ": give them as for other tools of that storage (AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, a profile, a role); for what is public, FSSPEC_S3_ANON=true"
    )


def told(path: Any) -> Any:
    """Return a `UPath` whose storage tells its errors, and so do all paths made of it."""
    with telling(str(path)):
        system = path.fs
    path._fs_cached = _System(system, f"{path.protocol}://")  # what paths made of it take along
    return path


class _System:
    """A file system of fsspec; each call of it is told of."""

    def __init__(self, system: Any, scheme: str) -> None:
        self._system, self._scheme = system, scheme

    def __getattr__(self, name: str) -> Any:
        if name == "_system":  # of a copy that is being made
            raise AttributeError(name)
        found = getattr(self._system, name)
        return self._wrapped(found) if inspect.ismethod(found) else found

    def exists(self, path: str, **options: Any) -> bool:
        """Return whether there is something; fsspec takes every error for a no."""
        return self._info(path, **options) is not None

    def isfile(self, path: str) -> bool:
        """Return whether it is a file, likewise."""
        return (self._info(path) or {}).get("type") == "file"

    def isdir(self, path: str) -> bool:
        """Return whether it is a folder, likewise."""
        return (self._info(path) or {}).get("type") == "directory"

    def _info(self, path: str, **options: Any) -> dict[str, Any] | None:
        try:
            return self.info(path, **options)
        except FileNotFoundError:
            return None

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        """Return a file whose reads are told of too."""
        url = self._url(path)
        with telling(url):
            return _File(self._system.open(path, *args, **options), url)

    def _url(self, path: object) -> str:
        text = str(path)
        return text if "://" in text else f"{self._scheme}{text.lstrip('/')}"

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            url = self._url(args[0] if args else "")
            with telling(url):
                found = method(*args, **options)
            return _told_of(found, url) if inspect.isgenerator(found) else found

        return call


class _File:
    """An open file; each call of it is told of."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with telling(self._url):
                return found(*args, **options)

        return call

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return _told_of(iter(self._file), self._url)


def _told_of(items: Iterator[Any], url: str) -> Iterator[Any]:
    with telling(url):
        yield from items
