"""Runs of several ranks, planted with the writer: what each rank cast is told row by row."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from truths.rows import cast_row, columns
from unclamp.runlog import Header, RunLogWriter

Name = tuple[str, str]


def header(world_size: int, run_id: str | None = "a") -> Header:
    return Header(unclamp_version="0.1.0", world_size=world_size, run_id=run_id)


def write_rank(
    path: Path,
    rank: int,
    steps: Iterable[int],
    *,
    world_size: int = 2,
    run_id: str = "a",
    resume: bool = False,
    casts: Mapping[Name, Mapping[str, Any]],
    repeated: Iterable[Name] = (),
    only_counted: Iterable[Name] = (),
    close: bool = True,
    **step: Any,
) -> RunLogWriter:
    """Write one rank's share: in each step a row a site, as `casts` says of its name."""
    writer = RunLogWriter(path, header=header(world_size, run_id), rank=rank, resume=resume)
    ids = {name: writer.first_site + i * world_size + rank for i, name in enumerate(casts)}
    sites = [
        {
            "site": number,
            "fqn": fqn,
            "role": role,
            "format": "e4m3fn",
            "scaling": "delayed",
            "format_max": 448.0,
            "replicated": (fqn, role) in repeated,
            "only_counted": (fqn, role) in only_counted,
        }
        for (fqn, role), number in ids.items()
    ]
    writer.add("sites", columns(sites))
    for number in steps:
        given = {name: [value(number) if callable(value) else value]
                 for name, value in step.items()}  # fmt: skip
        writer.add("steps", {"step": [number], "time_s": [0.0], **given})
        rows = [cast_row(number, ids[name], **changes) for name, changes in casts.items()]
        kinds = dict.fromkeys(kind for row in rows for kind in row if kind != "rank")
        writer.add("casts", {kind: [row.get(kind) for row in rows] for kind in kinds})
        writer.flush()
    if close:
        writer.close()
    return writer
