"""`unclamp backtest`: what would a rule for switching have done over the logs of a model?"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.places import place
from unclamp.errors import RunLogError
from unclamp.files import to_json

if TYPE_CHECKING:
    from unclamp.analysis.steering import Backtest

MOST_SHOWN = 20


@app.command()
def backtest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs of one model, or with such runs; or their URLs.",
            parser=place,
        ),
    ],
    rule: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help='The rule, such as "tolerance=0.1, floor=100, ladder=delayed(16) > guarded > '
            'dynamic"; what is left out is as it comes.',
            show_default=False,
        ),
    ] = "",
    late: Annotated[
        int,
        typer.Option(min=0, max=100, help="Steps until a decision is in force: 1 on a GPU."),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the backtest here, for Autopilot(..., backtest=FILE)."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Try a rule for switching scalings on logs: what it would have switched, and what missed."""
    from unclamp.analysis.steering import backtest as ask  # noqa: PLC0415
    from unclamp.analysis.steering import parse_rule  # noqa: PLC0415

    found = ask(_runs(paths), parse_rule(rule), late=late)
    if out is not None:
        try:
            found.save(out)
        except OSError as error:
            raise RunLogError(f"cannot write {str(out)!r}: {error.strerror}") from error
    if as_json:
        typer.echo(to_json(found.to_dict()))
        return
    _print(Console(highlight=False, markup=False), found)
    if out is not None:
        typer.echo(f"The backtest: {out}", err=True)


def _runs(paths: list[Path]) -> list[Path]:
    from unclamp.runlog import find_runs, is_run  # noqa: PLC0415

    return [
        run for path in paths for run in ([path] if is_run(path) else find_runs(path) or [path])
    ]


def _print(console: Console, found: "Backtest") -> None:
    from rich.table import Table  # noqa: PLC0415

    console.print(f"Rule: {found.rule}")
    for sentence in found.sentences:
        console.print(f"- {sentence}")
    # Of logs that differ in their figures alone, the first one's will do.
    said: dict[str, tuple[str, list[str]]] = {}
    for run in found.runs:
        for limit in run.limits:
            said.setdefault(re.sub(r"\d", "", limit), (limit, []))[1].append(run.run)
    for limit, runs in said.values():
        of_some = "" if len(runs) == len(found.runs) else f"Of {', '.join(runs)}: "
        console.print(f"- {of_some}{limit}")
    names = ("up", "back", "false", "held", "clamped", "first", "missed", "avoided", "reads")
    table = Table("run", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for run in found.runs:
        counts = (run.ups, run.downs, run.false, run.held, run.clamped, run.first, run.missed)
        table.add_row(
            run.run, *(f"{n:,}" for n in (*counts, run.avoided)), f"{run.reads_a_cast:.3f}"
        )
    console.print()
    console.print(table)
    console.print(
        "\nclamped: casts, on the rung of their moment. first, missed: those that may have lost "
        "more than the tolerance, and sent the site up, or not. avoided: later ones that the rung "
        "below would have. reads: a cast."
    )
    _print_decisions(console, found)


def _print_decisions(console: Console, found: "Backtest") -> None:
    decisions = [(run.run, each) for run in found.runs for each in run.decisions]
    if not decisions:
        return
    console.print("\nDecisions:")
    before = None
    for run, each in decisions[:MOST_SHOWN]:
        if run != before and len(found.runs) > 1:
            console.print(f"{run}")
        before = run
        console.print(f"  step {each.step}: {each.text}")
    if len(decisions) > MOST_SHOWN:
        console.print(f"  and {len(decisions) - MOST_SHOWN:,} more; --json has them all")
