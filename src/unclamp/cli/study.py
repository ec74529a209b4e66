"""`unclamp study`: train every arm, compare, write the page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from unclamp.cli.app import INTERRUPTED, JsonFlag, app
from unclamp.cli.report import show_report
from unclamp.errors import UnclampError

if TYPE_CHECKING:
    from unclamp.study.config import StudyConfig


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
    show_report(out, as_json=as_json)


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
