"""`unclamp formats` and `unclamp doctor`: what FP8 is, and what this machine does with it."""

import json

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.formats import FORMATS


@app.command()
def formats(as_json: JsonFlag = False) -> None:
    """Print the FP8 formats and their limits."""
    from rich.table import Table  # noqa: PLC0415

    rows = [
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
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(*(key.replace("_", " ") for key in rows[0]), box=None)
    for row in rows:
        table.add_row(*(f"{v:.10g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Probe what this machine's torch does with FP8, device by device."""
    from unclamp.doctor import diagnose  # noqa: PLC0415
    from unclamp.report.doctor import diagnosis_view  # noqa: PLC0415

    found = diagnose().to_dict()
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    Console().print(diagnosis_view(found))
