"""`unclamp associate`: does clamping at a site go with loss spikes more than chance?"""

from typing import Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.places import RunArgument
from unclamp.files import to_json

SHOWN = 10
ENDED = {
    "running": "has not finished (running or killed)",
    "interrupted": "was interrupted",
    "failed": "failed",
}


@app.command()
def associate(
    path: RunArgument,
    max_lag: Annotated[
        int, typer.Option(min=1, max=1000, help="Clamping counts within so many steps.")
    ] = 8,
    as_json: JsonFlag = False,
) -> None:
    """Say which sites clamp before loss spikes more often than by chance."""
    from rich.table import Table  # noqa: PLC0415

    from unclamp.analysis.association import associate as ask  # noqa: PLC0415
    from unclamp.analysis.sentences import change_in_words  # noqa: PLC0415
    from unclamp.runlog import RunLog  # noqa: PLC0415

    with RunLog.open(path) as log:
        found = ask(log, max_lag=max_lag)
        status = log.header.status
    if status != "finished":
        typer.echo(f"The run {ENDED[status]}: the answer is of what is there so far.", err=True)
    if as_json:
        typer.echo(to_json(found.to_dict()))
        return
    console = Console(highlight=False, markup=False)
    for sentence in found.sentences:
        console.print(f"- {sentence}")
    if not found.sites:
        return
    table = Table("site", "clamped", "before spikes", "p", "loss after", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    for site in found.sites[:SHOWN]:
        change = "-"
        if site.loss_change is not None:
            change = change_in_words(site.loss_change, is_relative=found.is_relative)
        hits = f"{site.hits} of {found.spikes} ({site.expected_hits:.1f})"
        mark = "* " if site.by else ""
        table.add_row(
            f"{mark}{site.fqn} {site.role}",
            f"{site.clamped_steps:,}",
            hits,
            f"{site.p:.3f}",
            change,
        )
    console.print()
    console.print(table)
    named = f"* named (p at most {found.level:g}). " if found.verdict == "named" else ""
    console.print(f"\n{named}clamped: steps. In brackets: expected by chance. p: over all sites.")
