"""`unclamp report`: the page, the tables and the JSON of a run, a study, or runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.places import place
from unclamp.errors import UnclampError
from unclamp.files import to_json

if TYPE_CHECKING:
    from unclamp.report.view import View

PAGE, COMPARISON_PAGE = "report.html", Path("compare.html")


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Folder or URL of a run or a study; or several runs, or a folder of runs, to "
            "compare.",
            parser=place,
        ),
    ],
    site: Annotated[
        list[str] | None,
        typer.Option(help="Glob of sites whose panels the page holds too; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page's file: PATH/report.html, ./report.html of a URL, or ./compare.html of "
            "several runs."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Arm or run that the others are compared with; the first run's arm."),
    ] = None,
    paired: Annotated[
        bool | None,
        typer.Option(
            "--paired/--unpaired",
            help="Whether compared runs began alike and saw the same batches; else it is looked "
            "for in their seeds and first losses.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a page and print the same figures: of a run, a study, or several runs compared."""
    from unclamp.report.side_by_side import runs_to_compare  # noqa: PLC0415

    runs, notes = runs_to_compare(paths)
    if not runs:
        if baseline is not None or paired is not None:
            option = "--baseline" if baseline is not None else "--paired"
            raise UnclampError(f"{option} is for several runs, and {paths[0]} is one path")
        show_report(paths[0], as_json=as_json, sites=site or (), out=out)
        return
    if site:
        raise UnclampError("--site is for the page of one run: unclamp report RUN --site GLOB")
    _show_comparison(
        runs,
        notes,
        baseline=baseline,
        paired=paired,
        out=out,
        as_json=as_json,
    )


def show_report(
    path: Path, *, as_json: bool, sites: Sequence[str] = (), out: Path | None = None
) -> None:
    """Write the page, beside the run unless `out` says where, and print its figures.

    `sites` as in `build_view`.
    """
    from unclamp.report.html import write_page  # noqa: PLC0415
    from unclamp.report.pages import check_page  # noqa: PLC0415
    from unclamp.report.text import print_view  # noqa: PLC0415
    from unclamp.report.view import build_view  # noqa: PLC0415

    if out is not None:  # in the run's own folder that name is the page's
        check_page(out)
    view: View = build_view(path, sites=sites)
    page = out or _page_of(path)
    try:
        write_page(view, page)
    except OSError as error:
        raise _cannot_write(page, error) from error
    if as_json:
        typer.echo(to_json({**view.to_dict(), "page": str(page)}))
        return
    print_view(view, Console())
    typer.echo(f"\nThe page: {page}")


def _page_of(path: Path) -> Path:
    """Return where a page goes: beside its run; of one in object storage, into this folder."""
    from unclamp.report.pages import free_page  # noqa: PLC0415
    from unclamp.runlog.located import is_remote  # noqa: PLC0415

    return free_page(Path(PAGE)) if is_remote(path) else path / PAGE


def _show_comparison(
    runs: Sequence[Path],
    notes: Sequence[str],
    *,
    baseline: str | None,
    paired: bool | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from unclamp.report.pages import check_page, free_page  # noqa: PLC0415
    from unclamp.report.side_by_side import compare_runs  # noqa: PLC0415
    from unclamp.report.side_by_side.page import write_comparison  # noqa: PLC0415
    from unclamp.report.side_by_side.text import print_comparison  # noqa: PLC0415

    page = free_page(COMPARISON_PAGE) if out is None else out
    own = [run / PAGE for run in runs]
    if page.resolve() in [path.resolve() for path in own]:
        raise UnclampError(f"{page} is the page of one of these runs: give --out another file")
    check_page(page)
    comparison = compare_runs(runs, baseline=baseline, paired=paired, notes=notes)
    try:
        write_comparison(comparison, page)
    except OSError as error:
        raise _cannot_write(page, error) from error
    if as_json:
        typer.echo(to_json({**comparison.to_dict(), "page": str(page)}))
        return
    print_comparison(comparison, Console())
    typer.echo(f"\nThe page: {page.resolve()}")


def _cannot_write(page: Path, error: OSError) -> UnclampError:
    return UnclampError(f"cannot write {str(page)!r}: {error}")
