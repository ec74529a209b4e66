"""Who may write to a run's folder: one writer a rank, all of one run. And its small files.

A rank claims the folder with a file of its own, `.writer-r0.json`, which only one process can
create; a later attempt of the run with `.writer-r0-a1.json`. It holds the id of the run, so that a
rank never joins another run, and later what could not be written, and how its log was closed. The
writer touches it as a sign of life.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclamp.errors import RunLogError
from unclamp.files import write_atomically
from unclamp.runlog.header import RUN_FILE, Header
from unclamp.runlog.schema import TABLES

_THIS_PROCESS = uuid.uuid4().hex
"""Which process: numbers come again, after a container's restart even this process's own."""
_CLAIM = re.compile(r"\.writer-r(\d+)(?:-a(\d+))?\.json")
_CLAIM_S = 2.0
"""How long another rank's claim may be empty: it is created, then filled."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a rank said when it began to write, and when it closed its log.

    Attributes:
        path: Its file.
        rank: The rank.
        attempt: How often the run had been begun before.
        data: What the file holds.
    """

    path: Path
    rank: int
    attempt: int
    data: Mapping[str, Any]

    @property
    def closed(self) -> str | None:
        """The status that the rank closed its log with; None where it did not, or could not say."""
        return self.data.get("closed")

    @property
    def is_closed(self) -> bool:
        """Whether the rank has closed its log."""
        return self.closed is not None

    @property
    def tells_of_close(self) -> bool:
        """Whether the writer would have said that it closed; those of earlier versions did not."""
        return "closed" in self.data


def create_run(path: Path, *, rank: int, header: Header, beats_s: float | None = None) -> None:
    """Claim `path` for `rank` of the run that `header` describes; rank 0 writes the header.

    `beats_s` is how often the writer will give a sign of life.

    Raises:
        RunLogError: `path` is a file, is in use, holds a run or something else, or cannot be
            written; the header is not JSON data.
    """
    check_header(header)
    _refuse_unless_free(path, rank)
    try:
        path.mkdir(parents=True, exist_ok=True)
        make_claim(path, rank, header.run_id, beats_s=beats_s)
        try:
            _refuse_another_run(path, rank, header.run_id)
            if rank == 0:
                write_header(path, header)
        except BaseException:
            claim_path(path, rank).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunLogError(f"cannot create the run {path}: {error}") from error


def make_claim(
    path: Path, rank: int, run_id: str | None, *, attempt: int = 0, beats_s: float | None = None
) -> None:
    """Claim an attempt of the run `path` for `rank`.

    Raises:
        RunLogError: It is claimed.
        OSError: The folder cannot be written.
    """
    claim = {
        "run_id": run_id,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "made_by": _THIS_PROCESS,
        "launch": launch_of(os.environ),
        "beats_s": beats_s,
        "closed": None,
    }
    name = claim_path(path, rank, attempt)
    try:
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise _in_use(path, rank) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(claim))


def launch_of(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return torchrun's id of a launch, and how often it has restarted the workers."""
    try:
        return environment["TORCHELASTIC_RUN_ID"], int(environment["TORCHELASTIC_RESTART_COUNT"])
    except (KeyError, ValueError):
        return None


def is_of_this_process(claim: Mapping[str, Any]) -> bool:
    """Whether this very process made a claim; one of before that had its number did not."""
    return claim.get("process") == os.getpid() and claim.get("made_by") == _THIS_PROCESS


def check_header(header: Header) -> None:
    """Raise a RunLogError for a header that cannot be written, because it is not JSON data."""
    _to_json(header)


def write_header(path: Path, header: Header) -> None:
    """Put `header` in the place of the one in the run `path`.

    Raises:
        RunLogError: It is not JSON data.
        OSError: It cannot be written.
    """
    write_atomically(path / RUN_FILE, _to_json(header))


def note_in_claim(path: Path, *, rank: int, attempt: int, **known: str) -> None:
    """Add to what the claim of a rank says: `missing` what it could not write, `closed` a status.

    Raises:
        OSError: That cannot be written either.
        ValueError: The claim holds something else.
    """
    file = claim_path(path, rank, attempt)
    write_atomically(file, f"{json.dumps(read_json(file) | known)}\n".encode())


def read_missing(path: Path) -> dict[int, str]:
    """Return what each rank noted as missing from the run `path`, by rank; a cheap look."""
    noted: dict[int, list[str]] = {}
    for claim in read_claims(path):
        if text := claim.data.get("missing"):
            noted.setdefault(claim.rank, []).append(str(text))
    return {rank: "; ".join(noted[rank]) for rank in sorted(noted)}


def read_claims(path: Path) -> list[Claim]:
    """Return what the claims of a run say, by attempt and rank; unreadable ones are left out."""
    found = []
    for file in path.glob(".writer-r*.json"):
        if (match := _CLAIM.fullmatch(file.name)) is not None:
            rank, attempt = int(match[1]), int(match[2] or 0)
            with suppress(OSError, ValueError):
                found.append(Claim(path=file, rank=rank, attempt=attempt, data=read_json(file)))
    return sorted(found, key=lambda claim: (claim.attempt, claim.rank))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else.
    """
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


def claim_path(path: Path, rank: int, attempt: int = 0) -> Path:
    """Return the file with which `rank` claims an attempt of the run `path`."""
    return path / (f".writer-r{rank}-a{attempt}.json" if attempt else f".writer-r{rank}.json")


def _refuse_unless_free(path: Path, rank: int) -> None:
    """Raise unless `path` is absent, empty, or holds only what the other ranks wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunLogError(f"expected a folder for the run, but {path} is a file; name another")
    held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    is_again = any(path.glob(".attempt-*.json"))
    if is_again or any(path.glob(f"*/part-r{rank}-*")) or (rank == 0 and RUN_FILE in held):
        raise _in_use(path, rank)
    foreign = [name for name in held if name not in {RUN_FILE, "summaries", *TABLES}]
    if foreign:
        raise RunLogError(
            f"expected a new or empty folder for the run, but {path} holds {foreign[:5]}; "
            "name another folder"
        )


def _refuse_another_run(path: Path, rank: int, run_id: str | None) -> None:
    """Raise if another rank, or rank 0's header, belongs to another run.

    Each rank looks after it has claimed, so of two that mix at least one notices.
    """
    if rank == 0 and (path / RUN_FILE).exists():
        raise _in_use(path, rank)
    files = {
        f"rank {match[1]}": file
        for file in path.glob(".writer-r*.json")
        if (match := _CLAIM.fullmatch(file.name)) and not match[2] and int(match[1]) != rank
    }
    if (path / RUN_FILE).exists():
        files["rank 0"] = path / RUN_FILE
    for writer, file in files.items():
        held = read_when_filled(file)
        if held is not None and held.get("run_id") != run_id:
            raise RunLogError(
                f"{path} holds what {writer} of another run wrote; name a new folder, runs never "
                "mix"
            )


def read_when_filled(path: Path) -> dict[str, Any] | None:
    """Return what a file holds as soon as it holds something; None if it was taken back."""
    give_up_at = time.monotonic() + _CLAIM_S
    while True:
        try:
            return read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if time.monotonic() >= give_up_at:
                raise RunLogError(
                    f"{path} cannot be read: {error}; name a new folder for the run"
                ) from error
            time.sleep(0.01)


def _in_use(path: Path, rank: int) -> RunLogError:
    """Return the refusal of a folder that holds a run, with who wrote it where that is known."""
    writer = ""
    with suppress(OSError, ValueError):
        claim = read_json(claim_path(path, rank))
        writer = f", begun by process {claim.get('process')} on {claim.get('host')}"
    return RunLogError(
        f"{path} already holds a run{writer}, and runs never mix: name a new folder; or go on with "
        f"that run by resume=True; or replace it with overwrite=True; "
        f'or have the folders numbered with {{n}}, "{path}-{{n}}"'
    )


def _to_json(header: Header) -> bytes:
    try:
        text = json.dumps(header.to_dict(), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunLogError(f"the header must be JSON data (no NaN, no Inf): {error}") from error
    return f"{text}\n".encode()
