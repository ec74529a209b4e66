"""`unclamp advise`: which scaling does a run need, where, and why?"""

import re
from typing import Annotated

import typer
from rich.console import Console

from unclamp.cli.app import USER_ERROR, JsonFlag, app
from unclamp.cli.places import RunArgument
from unclamp.files import to_json

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@app.command()
def advise(
    path: RunArgument,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N", help="Tokens that you want to train on, such as 200B or 1T."),
    ] = None,
    tokens_per_step: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens of a step; by default `tokens_per_step` of the run's metadata.",
        ),
    ] = None,
    harm: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=0.999,
            help="Clamp error of a cast that is tolerated; by default 0.5625, of gradients 0.92.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="READS",
            min=1,
            max=2,
            help="Most reads an element, on the average: delayed scaling takes 1, dynamic 2; by "
            "default as many as are needed.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which scaling a run needs, site by site, as a recipe to paste, with reasons."""
    from unclamp.analysis.advice import advise as ask  # noqa: PLC0415
    from unclamp.analysis.advice import reasons  # noqa: PLC0415
    from unclamp.runlog import RunLog  # noqa: PLC0415

    with RunLog.open(path) as log:
        horizon = _horizon(tokens, tokens_per_step, log.header.metadata.get("tokens_per_step"))
        found = ask(log, horizon=horizon, harm=harm, budget=budget)
    if as_json:
        typer.echo(to_json(found.to_dict()))
        return
    console = Console(highlight=False, markup=False)
    for sentence in reasons(found):
        console.print(f"- {sentence}")
    console.print("\nIn public (tokens decide nothing by themselves):")
    for run in sorted(found.record, key=lambda run: run.tokens):
        console.print(f"  {_short(run.tokens)} tokens, {run.scaling}: {run.outcome} ({run.source})")
    if found.verdict != "too short":
        console.print("\nThe recipe, to paste into a file for Recipe.load:\n")
        typer.echo(found.recipe.to_toml(), nl=False)


def _short(tokens: float) -> str:
    """Return a number of tokens as `--tokens` takes it: 200B, 14.8T."""
    return f"{tokens / 1e12:g}T" if tokens >= 1e12 else f"{tokens / 1e9:g}B"


def _horizon(tokens: str | None, per_step: str | None, recorded: object) -> int | None:
    if tokens is None:
        return None
    each = _number("--tokens-per-step", per_step) if per_step is not None else recorded
    if not isinstance(each, int | float) or not each > 0:
        typer.echo(
            "unclamp: how many steps is that? Give --tokens-per-step N, or record the run with "
            'Recorder(..., metadata={"tokens_per_step": N})',
            err=True,
        )
        raise typer.Exit(USER_ERROR)
    return max(round(_number("--tokens", tokens) / each), 1)


def _number(option: str, text: str) -> float:
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)([kmbgt]?)", text.strip().lower().replace("_", ""))
    try:
        return float(match[1]) * SUFFIXES[match[2]] if match else float(text)
    except ValueError:
        typer.echo(f"unclamp: expected a number such as 200B for {option}, got {text!r}", err=True)
        raise typer.Exit(USER_ERROR) from None
