"""`unclamp import`: logs of other tools as runs."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, command_group
from unclamp.written import counted

importing = command_group("import", help="Make a run of what another tool has logged.")


class Formats(StrEnum):
    """Formats that no statistic tells."""

    HYBRID = "hybrid"
    E4M3 = "e4m3"


@importing.callback()
def _group() -> None:
    """Make a run of what another tool has logged."""


@importing.command("nvdlfw")
def nvdlfw(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of nvdlfw-inspect's statistics logs, of Transformer Engine or BioNeMo; or "
            "one log file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run to write, new or empty.")],
    curve: Annotated[
        Path | None,
        typer.Option(
            help="File or folder with the losses, as `unclamp spikes` reads it.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Formats, typer.Option(help="hybrid: gradients in E5M2; e4m3: all in E4M3.")
    ] = Formats.HYBRID,
    as_json: JsonFlag = False,
) -> None:
    """Make a run of the debug logs of Transformer Engine (nvdlfw-inspect).

    It holds the amax and the scale of each tensor that was logged, and whether its cast clamped
    where that is certain. What the four decimals of these logs have destroyed is counted.
    """
    from unclamp.integrations.nvdlfw_logs import import_nvdlfw  # noqa: PLC0415

    found = import_nvdlfw(folder, out, curve=curve, formats=format.value)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{counted(found.casts, 'cast')} of {counted(found.sites, 'site')} in "
        f"{counted(found.iterations, 'iteration')}, of {counted(len(found.ranks), 'rank')}: "
        f"{found.run}",
        markup=False,
    )
    for note in found.notes:
        console.print(f"- {note}", markup=False)
    console.print(f"Next: unclamp report {found.run}", markup=False)
