"""A snapshot of several ranks on disk: each writes its part, and a marker says that all have.

    RUN/snapshots/step-000060-to-000068/
        rank-00000/     the part of rank 0: tensors, skeleton.pt, snapshot.json, as of one process
        rank-00001/     ...
        snapshot.json   the facts of rank 0's part: the marker, and what `find_snapshots` looks for

Whoever finds all parts there after it has written its own writes the marker; if two do, they write
the same. So a rank that failed, or that is gone, leaves no snapshot on any. No collective is
called, for writing takes place beside the training, on a thread. What a part holds is for `store`.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclamp.errors import ReplayError
from unclamp.explain.ranks import Ranks
from unclamp.files import write_atomically

FOLDER = "snapshots"
FACTS_FILE = "snapshot.json"
RANKS = "ranks"
"""The fact that says which part a snapshot's folder is; absent where one process wrote it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a snapshot a rank has.

    Attributes:
        rank: Of the one that wrote it.
        count: How many there are.
        launch: The launch of the ranks: parts of two launches are no whole; None if unknown.
    """

    rank: int
    count: int
    launch: str | None = None

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"rank-{self.rank:05d}"

    def to_facts(self) -> dict[str, Any]:
        """Return it as a fact of a snapshot; none of a process alone."""
        data = {"rank": self.rank, "count": self.count, "launch": self.launch}
        return {RANKS: data} if self.count > 1 else {}


def part_of(facts: Mapping[str, Any]) -> Part:
    """Return which part of a snapshot has these facts.

    Raises:
        ReplayError: What they say of it is no part.
    """
    data = facts.get(RANKS)
    if data is None:
        return Part(rank=0, count=1)
    try:
        return Part(rank=int(data["rank"]), count=int(data["count"]), launch=data["launch"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(f"expected rank, count and launch of a part, got {data!r}") from error


def name_of(step: int, last: int) -> str:
    """Return the name of a snapshot's folder."""
    return f"step-{step:06d}-to-{last:06d}"


def is_whole(run: Path, step: int, last: int) -> bool:
    """Whether all ranks have written a snapshot; it is marked if nobody has done so yet."""
    folder = run / FOLDER / name_of(step, last)
    return (folder / FACTS_FILE).exists() or mark(folder)


def begin(folder: Path) -> None:
    """Take the mark off a snapshot of which a part is about to be replaced."""
    with suppress(FileNotFoundError):
        (folder / FACTS_FILE).unlink()


def mark(folder: Path) -> bool:
    """Mark a snapshot as whole if all its parts are there, of one launch; return whether it is."""
    first = folder / Part(rank=0, count=1).folder / FACTS_FILE
    try:
        text = first.read_bytes()
        whole = part_of(json.loads(text))
        for rank in range(whole.count):
            part = Part(rank=rank, count=whole.count, launch=whole.launch)
            other = part_of(json.loads((folder / part.folder / FACTS_FILE).read_bytes()))
            if other != part:
                return False
        write_atomically(folder / FACTS_FILE, text)
    except (OSError, ValueError):  # not there, or being replaced just now
        return False
    return True


def remove_part(folder: Path, part: Part) -> None:
    """Remove a rank's part, and not the snapshot's folder: another rank may just have made it."""
    shutil.rmtree(folder / part.folder, ignore_errors=True)


def check_ranks(facts: Mapping[str, Any], ranks: Ranks, run: Path) -> None:
    """Raise unless as many ranks replay as have trained.

    Raises:
        ReplayError: They are more, or fewer; it says what to type.
    """
    count = part_of(facts).count
    if count == ranks.count:
        return
    command = f"-m unclamp explain {run}"
    start = f"torchrun --nproc-per-node {count}" if count > 1 else "python"
    were = f"{count} ranks" if count > 1 else "1 process"
    here = f"these are {ranks.count}" if ranks.are_several else "this is 1"
    raise ReplayError(f"the run was recorded on {were}, and {here}: {start} {command}")
