"""`unclamp compact`: a run's log in less room, without the loss of a clamped cast."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.places import here
from unclamp.files import to_json
from unclamp.written import counted

if TYPE_CHECKING:
    from unclamp.runlog import Compacted

SMALL = 2**20
"""From here on sizes are in MiB."""


@app.command()
def compact(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended.", parser=here)
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Thin old steps, and keep of them: recent=N, the last N steps whole (100000); "
            "every=N, each N-th step (16); near=N, N steps on both sides of a spike or event "
            "(100). Repeat it for several; what is not named is as in brackets.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how much it would free.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge a log's small parts and, with --keep, leave out old casts that lost nothing.

    No cast that clamped, overshot, was cast again, held Inf or NaN, or was inspected is left out.

    All totals stay exact.
    """
    from unclamp.analysis.compaction import compact_run  # noqa: PLC0415
    from unclamp.runlog import Keep, kept_words, read_header  # noqa: PLC0415

    rule = Keep.parse(keep) if keep else None
    earlier = [(one.before, one.keep) for one in read_header(path).thinned]
    found = compact_run(path, rule, is_tried=dry_run, on_part=_progress)
    if as_json:
        typer.echo(to_json({**asdict(found), "freed": found.freed}))
        return
    typer.echo(_freed(found))
    gone = found.rows - found.kept
    if rule is not None and not gone:
        why = "" if found.before > 0 else f": the last {counted(rule.recent, 'step')} stay whole"
        typer.echo(f"Of {counted(found.rows, 'row')} of casts the rule leaves out none{why}.")
        if earlier:
            typer.echo(
                "What was left out before does not come back. Kept before step "
                f"{max(before for before, _ in earlier):,}: {kept_words(earlier)}."
            )
    elif rule is not None:
        verb = "were" if found.is_done else "would be"
        rules = [*earlier, (found.before, rule)]
        typer.echo(
            f"Of {counted(found.rows, 'row')} of casts {gone:,} {verb} left out. Kept before step "
            f"{max(max(before for before, _ in rules), 0):,}: {kept_words(rules)}. "
            "Totals stay exact."
        )


def _progress(done: int, parts: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == parts else ""
        typer.echo(f"\r{done:,} of {parts:,} parts{end}", err=True, nl=False)


def _freed(found: "Compacted") -> str:
    share = 100 * found.freed / found.bytes_before if found.bytes_before else 0.0
    amount = f"{_size(found.freed)} of {_size(found.bytes_before)} ({share:.0f} %)"
    if found.is_done:
        parts = f"{counted(found.parts_before, 'part')} became {found.parts_after:,}"
        return f"Freed {amount}: {parts}."
    return f"Would free about {amount}; while it works, what stays is there twice."


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= SMALL else f"{count / 2**10:,.1f} KiB"
