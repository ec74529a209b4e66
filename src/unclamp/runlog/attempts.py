"""A run that is begun again in its folder: torchrun's restart, or a training that is resumed.

Each beginning is an attempt. Nothing that an earlier one wrote is touched: an attempt has parts,
claims and ids of sites of its own, and a reader leaves out the rows of earlier attempts from the
step on with which a later one began. So even a writer that was taken for dead could spoil nothing.

Ranks wait for nothing. The first of them that finds the last attempt over puts the next one's file
there, `.attempt-1.json`, with the id that its launch shares; the others find it by that id. Rank 0
writes the header when it comes.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unclamp.errors import RunLogError
from unclamp.runlog.finder import read_header
from unclamp.runlog.folder import (
    Claim,
    is_of_this_process,
    launch_of,
    make_claim,
    read_claims,
    read_when_filled,
    write_header,
)
from unclamp.runlog.header import RUN_FILE, SCHEMA_VERSION, Attempt, Header
from unclamp.runlog.parts import attempt_of, range_in

LAPSE_S = 60.0
"""A writer on another host that gave no sign for so long, and ten times as often as it does, is
dead."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The attempt that a rank has claimed.

    Attributes:
        attempt: Its number.
        header: What the rank writes if it is rank 0.
        first_site: The least id of a site that no earlier attempt has given.
    """

    attempt: int
    header: Header
    first_site: int


def is_begun(path: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return path.is_dir() and ((path / RUN_FILE).exists() or bool(read_claims(path)))


def begin_again(path: Path, *, rank: int, header: Header, beats_s: float | None = None) -> Joined:
    """Claim the next attempt of the run in `path` for `rank`, or the one that its launch has begun.

    Args:
        path: A folder with a run.
        rank: As in `create_run`.
        header: Of the new attempt.
        beats_s: As in `create_run`.

    Raises:
        RunLogError: A writer may be alive, ranks have no way to agree, another version wrote the
            run, or the folder cannot be written.
    """
    try:
        number = _agree(path, rank, header)
        make_claim(path, rank, header.run_id, attempt=number, beats_s=beats_s)
        if number:
            header = _continued(path, number, header)
        if rank == 0:
            write_header(path, header)
    except OSError as error:
        raise RunLogError(f"cannot go on with the run {path}: {error}") from error
    return Joined(attempt=number, header=header, first_site=_first_site(path, number))


def is_superseded(path: Path, *, attempt: int) -> bool:
    """Whether a run was begun again after this attempt: then its header is not this one's."""
    return any(number > attempt for number in _begun(path))


def _agree(path: Path, rank: int, header: Header) -> int:
    """Return the number of this launch's attempt; create it if no rank has."""
    while True:
        last = max(_begun(path), default=0)
        claims = [claim for claim in read_claims(path) if claim.attempt == last]
        own_id = _id_of(path, last, claims)
        is_same = header.run_id is not None and own_id == header.run_id
        if is_same and rank not in {c.rank for c in claims} and not any(map(_is_killed, claims)):
            return last
        for claim in claims:
            _refuse_writer(path, claim, "gone on with")
        if header.run_id is None and header.world_size > 1:
            raise RunLogError(
                f"the ranks have no way to agree on how {path} goes on: call "
                "torch.distributed.init_process_group before making the Recorder"
            )
        if _create(path, last + 1, header.run_id):
            return last + 1


def _create(path: Path, number: int, run_id: str | None) -> bool:
    """Begin an attempt; return False if another process has just done so."""
    try:
        file = os.open(_attempt_path(path, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(file, "w", encoding="utf-8") as filled:
        filled.write(json.dumps({"run_id": run_id, "created": _now()}))
    return True


def _attempt_path(path: Path, number: int) -> Path:
    return path / f".attempt-{number}.json"


def _begun(path: Path) -> list[int]:
    """Return the numbers of the attempts after the first; a copy may lack files with a dot."""
    names = (p.name.removeprefix(".attempt-").removesuffix(".json")
             for p in path.glob(".attempt-*.json"))  # fmt: skip
    numbers = [int(name) for name in names if name.isdecimal()]
    numbers += filter(None, map(attempt_of, path.glob("*/part-r*-a*.parquet")))
    if (path / RUN_FILE).exists():
        numbers += [attempt.number for attempt in read_header(path).attempts if attempt.number]
    return numbers


def _id_of(path: Path, number: int, claims: Iterable[Claim]) -> str | None:
    """Return the id of an attempt's launch."""
    if number:
        filled = read_when_filled(_attempt_path(path, number))
        return None if filled is None else filled.get("run_id")
    known: list[str | None] = [claim.data.get("run_id") for claim in claims]
    if (path / RUN_FILE).exists():
        header = read_header(path)
        if not header.attempts:
            known.append(header.run_id)
    return next((each for each in known if each is not None), None)


def _continued(path: Path, number: int, header: Header) -> Header:
    """Return the header of an attempt, with what is kept of those before."""
    if not (path / RUN_FILE).exists():
        return header  # rank 0 of the first attempt never came
    old = read_header(path)
    if old.schema_version != SCHEMA_VERSION:
        raise RunLogError(
            f"{path} was written with schema version {old.schema_version}, and this unclamp goes "
            f"on only with runs of version {SCHEMA_VERSION}: name a new folder"
        )
    before = [attempt for attempt in old.attempts if attempt.number < number]
    if len(before) == len(old.attempts):  # its header is still of an attempt before
        before = before or [_attempt(old, 0, created=old.created)]
        ended = "killed" if old.status == "running" else old.status
        before[-1] = replace(before[-1], ended=ended)
    return replace(
        header,
        created=old.created,
        missing=old.missing,
        thinned=old.thinned,
        notes=list(dict.fromkeys([*old.notes, *header.notes])),
        attempts=[*before, _attempt(header, number, created=_now())],
    )


def _attempt(header: Header, number: int, *, created: str) -> Attempt:
    return Attempt(
        number=number,
        created=created,
        world_size=header.world_size,
        unclamp_version=header.unclamp_version,
        run_id=header.run_id,
    )


def _first_site(path: Path, attempt: int) -> int:
    """Return the least id above all that earlier attempts gave; the same on every rank."""
    parts = [p for p in (path / "sites").glob("*.parquet") if attempt_of(p) < attempt]
    found = range_in(parts, "site")
    return 0 if attempt == 0 or found is None else found[1] + 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- who is alive ------------------------------------------------------------------------------


def _is_killed(claim: Claim) -> bool:
    return not claim.is_closed and _sign_of_life(claim) is None


def refuse_if_written(path: Path, *, wanted: str) -> None:
    """Raise a RunLogError if the run `path` may still be written; it is wanted to be `wanted`."""
    for claim in read_claims(path):
        _refuse_writer(path, claim, wanted)


def _refuse_writer(path: Path, claim: Claim, wanted: str) -> None:
    """Raise if who made a claim may still write."""
    if claim.is_closed or (sign := _sign_of_life(claim)) is None:
        return
    raise RunLogError(
        f"{path} cannot be {wanted}, rank {claim.rank} of it is being written by {sign}"
        + ("; or name another folder" if wanted == "gone on with" else "")
    )


def _sign_of_life(claim: Claim) -> str | None:
    """Return why a writer that did not close may be alive, as the end of a sentence."""
    process, host = claim.data.get("process"), claim.data.get("host")
    if is_of_this_process(claim.data):
        return "this process: close its recorder first"
    if host == socket.gethostname():
        is_other = process != os.getpid()
        is_there = is_other and is_alive(process)
        return f"process {process}: stop that first" if is_there else None
    if _is_restart_of(claim.data):
        return None  # the launcher ends all workers, of every host, before it starts new ones
    quiet_s = _seconds_since_sign(claim.path)
    lapse_s = max(LAPSE_S, 10 * float(claim.data.get("beats_s") or 0))
    if quiet_s is None or quiet_s > lapse_s:
        return None
    return (
        f"process {process} on {host}, or was {quiet_s:.0f} s ago: if that has ended, wait until "
        f"it has been quiet for {lapse_s:.0f} s"
    )


def _is_restart_of(claim: Mapping[str, Any]) -> bool:
    """Whether torchrun started this process again, after the one that made a claim."""
    now, then = launch_of(os.environ), claim.get("launch")
    if now is None or not isinstance(then, list) or len(then) != len(now):
        return False
    return then[0] == now[0] and isinstance(then[1], int) and then[1] < now[1]


def _seconds_since_sign(file: Path) -> float | None:
    """Return how long ago a claim was touched, by the clock of its file system."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=file.parent, prefix=".now-") as now:
        return os.stat(now.name).st_mtime - file.stat().st_mtime
    return None


def is_alive(process: object) -> bool:
    """Whether a process of this host lives, as far as that can be known."""
    if not isinstance(process, int) or process <= 0:
        return False
    if os.name == "nt":
        return True  # a signal of 0, which asks elsewhere, would end the process there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Whether a process has ended, and its parent has not asked how; only Linux says."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False
