"""`unclamp formats` and `unclamp doctor`: what FP8 is, and what this machine does with it."""

from itertools import groupby
from typing import Any

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.files import to_json
from unclamp.formats import FORMATS


@app.command()
def formats(as_json: JsonFlag = False) -> None:
    """Print the FP8 formats and their limits."""
    from rich.table import Table  # noqa: PLC0415

    rows: list[dict[str, Any]] = [
        {
            "name": fmt.name,
            "max": fmt.max,
            "overflow_limit": fmt.overflow_limit,
            "min_normal": fmt.min_normal,
            "min_subnormal": fmt.min_subnormal,
            "has_infinity": fmt.infinity_code is not None,
            "standard": fmt.standard,
        }
        for fmt in FORMATS.values()
    ]
    if as_json:
        typer.echo(to_json(rows))
        return
    shown = [key for key in rows[0] if key != "standard"]  # too long for a terminal's table
    table = Table(*(key.replace("_", " ") for key in shown), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in shown))
    console = Console()
    console.print(table)
    console.print()
    for standard, same in groupby(rows, key=lambda row: row["standard"]):
        console.print(f"{', '.join(row['name'] for row in same)}: {standard}", highlight=False)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Probe what this machine's torch does with FP8, device by device."""
    from unclamp.doctor import diagnose  # noqa: PLC0415
    from unclamp.report.doctor import diagnosis_view  # noqa: PLC0415

    found = diagnose().to_dict()
    if as_json:
        typer.echo(to_json(found))
        return
    Console().print(diagnosis_view(found))
