"""`unclamp coverage`: how much of a model's work FP8 would cover, from its config alone."""

from pathlib import Path
from typing import Annotated

import typer

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.interrupt import leaving_at_ctrl_c
from unclamp.errors import UnclampError
from unclamp.files import to_json


@app.command()
def coverage(
    hf_model: Annotated[
        str,
        typer.Option(
            help="A config.json, a folder with one, or a name on the hub. Weights are not needed."
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence.",
            show_default="the model's positions, at most 8192",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences or pictures.")] = 1,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe in TOML; the default one without it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which matrix products of a model FP8 would cover, and which it leaves out and why."""
    with leaving_at_ctrl_c("Interrupted."):
        try:
            from unclamp.blueprint import batch_of, model_of  # noqa: PLC0415 - torch takes a while
        except ImportError as error:
            raise UnclampError(
                f"this needs {error.name}: install it with pip install 'unclamp[hf]'"
            ) from error
        from unclamp.nn import convert  # noqa: PLC0415
        from unclamp.nn import coverage as coverage_of  # noqa: PLC0415
        from unclamp.recipe import Recipe  # noqa: PLC0415

        chosen = None if recipe is None else Recipe.load(recipe)
        model = model_of(hf_model)
        inputs = batch_of(model, batch=batch, tokens=tokens)
        if tokens is not None and not any(
            getattr(value, "shape", ()) == (batch, tokens) for value in inputs.values()
        ):
            typer.echo("unclamp: --tokens changes nothing: the model takes none", err=True)
        if chosen is not None:
            convert(model, chosen)
        found = coverage_of(model, **inputs)
    if as_json:
        typer.echo(to_json(found.to_dict()))
        return
    shapes = ", ".join(
        f"{name} {' x '.join(map(str, value.shape))}"
        for name, value in inputs.items()
        if hasattr(value, "shape")
    )
    typer.echo(f"{type(model).__name__}, a step of {shapes}\n")
    typer.echo(str(found))
