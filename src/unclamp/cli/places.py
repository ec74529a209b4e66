"""Arguments that say where a run lies: a folder, or a URL such as s3://bucket/run."""

from pathlib import Path
from typing import Annotated

import typer

from unclamp.errors import RunLogError, UnclampError


def place(text: str) -> Path:
    """Return the path of what was typed; a URL's storage is asked whether it can be read."""
    if "://" not in text:
        return Path(text)
    from unclamp.runlog.located import located  # noqa: PLC0415 - pyarrow takes a while

    try:
        return located(text)
    except RunLogError as error:  # a ValueError would be taken for a wrong option
        raise UnclampError(str(error)) from error


def folder(text: str) -> Path:
    """Return the path of a folder to write to, which cannot be a URL."""
    if "://" in text:
        raise UnclampError(
            f"expected a folder to write to, got {text}: write to a folder, and copy it when it is "
            f"finished, such as by `aws s3 sync FOLDER {text}`"
        )
    return Path(text)


def here(text: str) -> Path:
    """Return the path of a run's folder, for what reading alone is not enough."""
    if "://" in text:
        how = f", such as by `aws s3 sync {text} FOLDER`" if text.startswith("s3://") else ""
        raise UnclampError(
            f"expected a folder, got {text}: copy the run to this machine first{how}"
        )
    return Path(text)


RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, or its URL.", parser=place)
]
