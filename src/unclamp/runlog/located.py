"""Where a run lies: in a folder, or in object storage under a URL such as `s3://bucket/run`.

A path of a run is a `pathlib.Path`, or a `upath.UPath`, which has the same methods for whatever
fsspec reads: `s3://`, `gs://`, `az://`, `memory://` and others. Parquet files are read through
Arrow's bridge to fsspec, by the ranges that a query needs. Only reading knows of URLs: what writes
a run asks its folder for things that object storage has not, such as renaming.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from unclamp.errors import RunLogError
from unclamp.runlog.storage import telling, told

LISTING_S = 5.0
"""How long a listing of object storage is taken for true: a query makes several."""
_COALESCE = 256 * 1024
"""Ranges of a file that are closer than this are read at once: a request takes longer than they."""
REMOTE_PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(
        pre_buffer=True, cache_options=pa.CacheOptions(hole_size_limit=_COALESCE)
    )
)


def is_remote(path: object) -> bool:
    """Whether a path is a URL, or what `located` made of one."""
    return hasattr(path, "fs") or (isinstance(path, str) and "://" in path)


def located(path: str | os.PathLike[str]) -> Path:
    """Return the path of a run's folder, or of whatever holds runs.

    A URL is asked for once, so that what is wrong with it is told in a sentence.

    Raises:
        RunLogError: A URL whose storage cannot be read, or a package is missing for it.
    """
    if not is_remote(path):
        return Path(path)
    if not isinstance(path, str):
        return cast(Path, path)
    with telling(path):
        from upath import UPath  # noqa: PLC0415 - an extra

        made = told(UPath(path, use_listings_cache=True, listings_expiry_time=LISTING_S))
        _reach(made)
    return cast(Path, made)


def local(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is written to.

    Raises:
        RunLogError: It is a URL.
    """
    if is_remote(path):
        raise RunLogError(
            f"a run is written to a folder and read from anywhere: expected a folder, got {path}; "
            f"copy the finished one, such as by `aws s3 sync FOLDER {path}`"
        )
    return Path(path)


def arrow_name(path: Path) -> str:
    """Return what Arrow calls a file, in `arrow_system(path)`."""
    return str(path) if isinstance(path, Path) else cast(Any, path).path


def arrow_system(path: Path) -> pafs.FileSystem | None:
    """Return the file system that Arrow reads a file of; None for the machine's own."""
    return None if isinstance(path, Path) else pafs.PyFileSystem(_Ranges(cast(Any, path).fs))


def forget_listing(path: Path) -> None:
    """Have a folder listed anew, where listings are kept."""
    if not isinstance(path, Path):
        cast(Any, path).fs.invalidate_cache()


def walk(path: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Return every folder at or below `path`, with its folders, which may be taken out, and files.

    Links to folders are not followed.
    """
    if isinstance(path, Path):
        return ((Path(folder), folders, files) for folder, folders, files in os.walk(path))
    return cast(Any, path).walk()


class _Ranges(pafs.FSSpecHandler):
    """Reads what is asked for of a file, and nothing ahead: Arrow knows what it will need."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def _reach(path: Any) -> None:
    """Ask the storage for a path; raise what it says, but not that there is nothing there."""
    has_buckets = path.protocol in ("s3", "s3a", "gs", "gcs")
    top = path.path.lstrip("/").split("/")[0]
    if has_buckets and not top:
        raise RunLogError(f"expected {path.protocol}://BUCKET/FOLDER, got {path}")
    try:
        path.fs.info(path.path)
    except FileNotFoundError:
        if has_buckets and not path.fs.exists(top):
            raise RunLogError(f"expected a run in {path}, but there is no bucket {top!r}") from None
