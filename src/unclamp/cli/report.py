"""`unclamp report`: the page, the tables and the JSON of a run or a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.errors import UnclampError
from unclamp.files import to_json

if TYPE_CHECKING:
    from unclamp.report.view import View


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a run or a study.")],
    site: Annotated[
        list[str] | None,
        typer.Option(help="Glob of sites whose panels the page holds too; may be repeated."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write PATH/report.html and print the same figures."""
    show_report(path, as_json=as_json, sites=site or ())


def show_report(path: Path, *, as_json: bool, sites: Sequence[str] = ()) -> None:
    """Write the page beside the run and print its figures; `sites` as in `build_view`."""
    from unclamp.report.html import write_page  # noqa: PLC0415
    from unclamp.report.text import print_view  # noqa: PLC0415
    from unclamp.report.view import build_view  # noqa: PLC0415

    view: View = build_view(path, sites=sites)
    try:
        page = write_page(view, path / "report.html")
    except OSError as error:
        raise UnclampError(f"cannot write {str(path / 'report.html')!r}: {error}") from error
    if as_json:
        typer.echo(to_json({**view.to_dict(), "page": str(page)}))
        return
    print_view(view, Console())
    typer.echo(f"\nThe page: {page}")
