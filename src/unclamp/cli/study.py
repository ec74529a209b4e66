"""`unclamp study`: train every arm, compare, write the page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
import typer
from rich.console import Console

from unclamp.cli.app import INTERRUPTED, JsonFlag, app
from unclamp.cli.interrupt import leaving_at_ctrl_c
from unclamp.cli.places import folder as to_folder
from unclamp.cli.report import show_report
from unclamp.errors import StudyError, UnclampError
from unclamp.files import to_json
from unclamp.formats import unknown_name

if TYPE_CHECKING:
    from unclamp.study.config import StudyConfig

QUICK_OUT, WHOLE_OUT = Path("runs/quick"), Path("runs/study")
QUICK_ARMS = ("dynamic", "delayed", "guarded")
QUICK_STEPS = 70
"""Two planted steps, at 40 and 60, and some steps after them."""


@app.command()
def study(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the study; resumed if it is the same.",
            parser=to_folder,
            metavar="FOLDER",
            show_default="runs/study, or runs/quick",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look in about a minute: one scenario, one seed, the arms dynamic, "
            "delayed and guarded. Other options override it.",
        ),
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Study file in TOML, as --print-config prints it.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="text, outlier or labels; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a run.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", help="Only these arms; may be repeated. The others are compared with dynamic."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="File to train on, of any kind; may be repeated.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="The small model that is trained: llama or moe, a mixture of experts."),
    ] = None,
    hf_model: Annotated[
        str | None, typer.Option(help="Folder or name of a causal LM to train instead.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; one a core.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ADDRESS",
            help="Train on a Ray cluster: auto for the one that this machine is part of.",
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print the study that these options make, as a study file (with --json as JSON), "
            "and stop.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="An override or skip glob without a match is an error.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train every arm on the same batches, compare, and write a page."""
    with leaving_at_ctrl_c("Interrupted: nothing was trained."):
        if quick and config is not None:
            raise StudyError(
                "--quick is a study of its own: leave out --config, or shorten that study with "
                "--scenario, --seeds, --steps and --arm"
            )
        changes = {
            "scenarios": scenario or None,
            "steps": steps,
            "seeds": None if seeds is None else list(range(seeds)),
            "arms": arm or None,
        }
        if quick:
            changes = _quick(hf_model) | {k: v for k, v in changes.items() if v is not None}
        made = _make(
            config,
            changes,
            text=text,
            model={"architecture": architecture, "hf_model": hf_model, "strict": strict or None},
        )
        if print_config:
            _print_config(made, as_json=as_json)
            return
        folder = out or (QUICK_OUT if quick else WHOLE_OUT)
        if quick:
            _say_quick(made)
        _say_if_nothing_is_compared(made)
        is_finished = _run_study(made, folder, jobs, ray)
    if not is_finished:
        raise typer.Exit(INTERRUPTED)
    with leaving_at_ctrl_c(
        f"Interrupted: all runs are kept, the page is not written; unclamp report {folder} does it."
    ):
        show_report(folder, as_json=as_json)
    if as_json:
        _say(f"The page: {folder / 'report.html'}")
    if quick and len(made.seeds) == 1:
        _say("With one seed nothing can be said about small differences: unclamp study has three.")


def _quick(hf_model: str | None) -> dict[str, Any]:
    """Return what a first look changes of the default study.

    A model of one's own gets plain text: planting would write into its weights, and suits few.
    """
    scenario = "outlier" if hf_model is None else "text"
    return {
        "scenarios": [scenario],
        "arms": list(QUICK_ARMS),
        "seeds": [0],
        "steps": QUICK_STEPS,
    }


def _make(
    file: Path | None,
    changes: dict[str, Any],
    *,
    text: list[str] | None,
    model: dict[str, Any],
) -> "StudyConfig":
    from unclamp.study.config import StudyConfig, default_toml  # noqa: PLC0415

    base = StudyConfig.from_toml(default_toml()) if file is None else StudyConfig.load(file)
    data: dict[str, Any] = base.to_dict()
    for key, value in changes.items():
        if value is not None:
            data[key] = _chosen(data["arms"], value) if key == "arms" else value
    if text:
        data["data"]["text"] = text
    data["model"] |= {key: value for key, value in model.items() if value is not None}
    return StudyConfig.from_dict(data)


def _chosen(arms: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Keep the wanted arms, and those they start from."""
    for name in wanted:
        if name not in arms:
            raise StudyError(str(unknown_name("arm", name, list(arms))))
    needed = {*wanted, *(arms[name]["from"] for name in wanted if "from" in arms[name])}
    return {name: arm for name, arm in arms.items() if name in needed}


def _print_config(config: "StudyConfig", *, as_json: bool) -> None:
    """Print a study file; the default study's as it ships, with its comments."""
    from unclamp.study.config import StudyConfig, default_toml  # noqa: PLC0415

    if as_json:
        typer.echo(to_json(config.to_dict()))
    elif config == StudyConfig.from_toml(default_toml()):
        typer.echo(default_toml(), nl=False)
    else:
        typer.echo(tomli_w.dumps(config.to_dict()), nl=False)


def _say_quick(config: "StudyConfig") -> None:
    seeds = "one seed" if len(config.seeds) == 1 else f"{len(config.seeds)} seeds"
    what = f"scenario {', '.join(config.scenarios)}, arms {', '.join(config.arms)}, {seeds}"
    _say(f"A first look, not the whole study: {what}.")


def _run_study(config: "StudyConfig", out: Path, jobs: int | None, ray: str | None) -> bool:
    """Train; return whether it came to its end."""
    if ray is None:
        from unclamp.study.forking import prepare  # noqa: PLC0415

        prepare()
    try:
        from unclamp.study.progress import run_with_progress  # noqa: PLC0415
    except ImportError as error:
        raise UnclampError(
            f"the study needs {error.name}: install it with pip install 'unclamp[hf]'"
        ) from error
    return run_with_progress(config, out, jobs=jobs, ray=ray, console=Console(stderr=True))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _say_if_nothing_is_compared(made: "StudyConfig") -> None:
    from unclamp.report.arms import BASELINE  # noqa: PLC0415 - scipy takes a while

    if BASELINE not in made.arms and len(made.arms) > 1:
        _say(
            f"unclamp: without the arm {BASELINE} no arm is called better or worse; add --arm "
            f"{BASELINE} to compare them."
        )
