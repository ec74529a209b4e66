"""The header of a run: what ran, how it ended, and what is missing. It touches no disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from unclamp.errors import RunLogError, did_you_mean
from unclamp.runlog import schema_1
from unclamp.runlog.cadence import Cadence
from unclamp.runlog.keeping import Thinned

KIND = "unclamp-run"
SCHEMA_VERSION = 2
RUN_FILE = "run.json"
_LATER_FIELDS = {
    "run_id": None, "missing": None, "cadence": None, "observed": False,
    "notes": [], "attempts": [], "counts": "elements", "thinned": [],
}  # fmt: skip
"""What the headers of version 1 did not have, or not from the start."""

Status = Literal["running", "finished", "interrupted", "failed"]
Counts = Literal["elements", "casts"]
"""What a run counts: the elements that casts lost, or only which casts clamped."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One beginning of a run that was begun more than once.

    Attributes:
        number: How often the run had been begun before.
        created: When, ISO-8601 in UTC.
        world_size: Its ranks.
        unclamp_version: What wrote it.
        run_id: Of its launch.
        ended: How it ended, a status or "killed"; None of the last one, whose status the header
            has.
    """

    number: int
    created: str
    world_size: int
    unclamp_version: str
    run_id: str | None = None
    ended: str | None = None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What ran, and how it ended: the content of `run.json`.

    `status` is "running" until the run is closed, and stays so when the process is killed;
    "interrupted" is an end from outside, "failed" an exception or a log that could not be written
    to the end. `missing` says what of rank 0 could not be written, None where nothing is known to
    be. `cadence` says how often casts were recorded, None where nobody said; `observed` that they
    were only counted, in a training without FP8; `plain` that no layer was meant to be in FP8: a
    run without a recipe that is not plain may have been converted after its log began. `counts` is
    "casts" where only the largest element of each cast is known, as of the scaling state that
    others keep: which casts clamped is known, and how many elements, null. `run_id` is the same for
    all ranks of a launch, None where nobody said. `notes` are sentences that a reader
    must see beside the figures, such as an override that matched no layer. `attempts` are the
    beginnings of a run that was begun again, the first one first, and empty for others: what else
    the header says is of the last one. `thinned` says by which rules rows of `casts` were left out
    after the run, the first one first. `created` is that of the first, ISO-8601 in UTC. `recipe`,
    `environment` and `metadata`, which is the user's, hold plain JSON data: what JSON cannot
    express is refused when the header is written.
    """

    unclamp_version: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    status: Status = "running"
    world_size: int = 1
    recipe: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    git_commit: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    cadence: Cadence | None = None
    observed: bool = False
    plain: bool = False
    counts: Counts = "elements"
    notes: list[str] = field(default_factory=list)
    run_id: str | None = None
    missing: str | None = None
    attempts: list[Attempt] = field(default_factory=list)
    thinned: list[Thinned] = field(default_factory=list)
    kind: str = KIND
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the header as plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Header:
        """Return the header that `to_dict` was called on; unknown keys are ignored.

        Raises:
            RunLogError: `data` is of another kind or schema version, or lacks a key.
        """
        if data.get("kind") != KIND:
            raise RunLogError(f"expected kind {KIND!r}, got {data.get('kind')!r}: not a run")
        if data.get("schema_version") not in (schema_1.VERSION, SCHEMA_VERSION):
            raise RunLogError(
                f"it was written by unclamp {data.get('unclamp_version')} with schema version "
                f"{data.get('schema_version')}, and this unclamp reads versions "
                f"{schema_1.VERSION} to {SCHEMA_VERSION}; install that unclamp to read it"
            )
        if data["schema_version"] == schema_1.VERSION:
            data = schema_1.lift_header(data)
        data = {**_LATER_FIELDS, "plain": _was_plain(data), **data}
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise RunLogError(f"its header lacks {missing}; was {RUN_FILE} edited by hand?")
        if data["status"] not in get_args(Status):
            hint = did_you_mean(data["status"], get_args(Status))
            raise RunLogError(
                f"status must be one of {get_args(Status)}, got {data['status']!r}{hint}"
            )
        if data["counts"] not in get_args(Counts):
            raise RunLogError(f"counts must be one of {get_args(Counts)}, got {data['counts']!r}")
        given: dict[str, Any] = {f.name: data[f.name] for f in fields(cls)}
        given["cadence"] = Cadence.from_dict(given["cadence"])
        given["attempts"] = [_attempt(each) for each in given["attempts"]]
        given["thinned"] = [Thinned.from_dict(each) for each in given["thinned"]]
        return cls(**given)


def _attempt(data: Mapping[str, Any]) -> Attempt:
    known = {f.name for f in fields(Attempt)}
    try:
        return Attempt(**{key: value for key, value in data.items() if key in known})
    except (AttributeError, TypeError) as error:
        raise RunLogError(f"its header names an attempt that it cannot be: {error}") from error


def _was_plain(data: Mapping[str, Any]) -> bool:
    """Whether a log from before `plain` is of a study's arm that was to have no layer in FP8."""
    told = data.get("metadata") or {}
    is_arm = {"scenario", "arm", "seed", "recipe"} <= set(told)
    return is_arm and told["recipe"] is None and data.get("recipe") is None
