"""The command line: `unclamp study | report | doctor | formats`.

Results go to stdout, progress and notes to stderr, so that `--json` prints one JSON document and
nothing else. What a user can mend is one line and exit code 2. torch is imported only by the
commands that train or probe.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from unclamp.errors import UnclampError
from unclamp.formats import FORMATS
from unclamp.version import __version__

if TYPE_CHECKING:
    from unclamp.report.view import View
    from unclamp.study.config import StudyConfig

INTERRUPTED = 130
USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="FP8 training in which clamping is measured, explained and prevented.",
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unclamp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def study(
    out: Annotated[
        Path, typer.Option(help="Folder of the study; resumed if it is the same.")
    ] = Path("runs/study"),
    config: Annotated[Path | None, typer.Option(help="Study file in TOML.")] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="text or outlier; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds: 0, 1, ...")] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="Only these arms; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="File to train on, of any kind; may be repeated.")
    ] = None,
    hf_model: Annotated[
        str | None, typer.Option(help="Folder or name of a causal LM to train instead.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; one a core.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the default study file and stop.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="An override or skip glob without a match is an error.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train every arm on the same batches, compare, and write a page."""
    from unclamp.study.config import StudyConfig, default_toml  # noqa: PLC0415

    if print_config:
        typer.echo(default_toml(), nl=False)
        return
    base = StudyConfig.from_toml(default_toml()) if config is None else StudyConfig.load(config)
    changes: dict[str, Any] = base.to_dict()
    if scenario:
        changes["scenarios"] = scenario
    if steps is not None:
        changes["steps"] = steps
    if seeds is not None:
        changes["seeds"] = list(range(seeds))
    if arm:
        changes["arms"] = _chosen(changes["arms"], arm)
    if text:
        changes["data"]["text"] = text
    if hf_model is not None:
        changes["model"]["hf_model"] = hf_model
    if strict:
        changes["model"]["strict"] = True
    _run_study(StudyConfig.from_dict(changes), out, jobs)
    _report(out, as_json=as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a run or a study.")],
    as_json: JsonFlag = False,
) -> None:
    """Write PATH/report.html and print the same figures."""
    _report(path, as_json=as_json)


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


def _chosen(arms: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Keep the wanted arms, and those they start from."""
    from unclamp.errors import StudyError  # noqa: PLC0415
    from unclamp.formats import unknown_name  # noqa: PLC0415

    for name in wanted:
        if name not in arms:
            raise StudyError(str(unknown_name("arm", name, list(arms))))
    needed = {*wanted, *(arms[name]["from"] for name in wanted if "from" in arms[name])}
    return {name: arm for name, arm in arms.items() if name in needed}


def _run_study(config: "StudyConfig", out: Path, jobs: int | None) -> None:
    try:
        from unclamp.study.progress import run_with_progress  # noqa: PLC0415
    except ImportError as error:
        raise UnclampError(
            f"the study needs {error.name}: install it with pip install 'unclamp[hf]'"
        ) from error
    if not run_with_progress(config, out, jobs=jobs, console=Console(stderr=True)):
        raise typer.Exit(INTERRUPTED)


def _report(path: Path, *, as_json: bool) -> None:
    from unclamp.report.html import write_page  # noqa: PLC0415
    from unclamp.report.text import print_view  # noqa: PLC0415
    from unclamp.report.view import build_view  # noqa: PLC0415

    view: View = build_view(path)
    try:
        page = write_page(view, path / "report.html")
    except OSError as error:
        raise UnclampError(f"cannot write {str(path / 'report.html')!r}: {error}") from error
    if as_json:
        typer.echo(json.dumps({**view.to_dict(), "page": str(page)}, indent=1, allow_nan=False))
        return
    print_view(view, Console(width=None if sys.stdout.isatty() else 160))
    typer.echo(f"\nThe page: {page}")


def main() -> None:
    """Run the command line; the entry point `unclamp`."""
    try:
        app()
    except UnclampError as error:
        typer.echo(f"unclamp: {error}", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
