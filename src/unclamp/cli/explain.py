"""`unclamp explain`: which clamped tensors caused a loss spike, by replays from a snapshot.

A run of several ranks is explained by as many: torchrun --nproc-per-node N -m unclamp explain RUN.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unclamp.cli.app import INTERRUPTED, JsonFlag, app
from unclamp.cli.places import here
from unclamp.cli.ranked import one_voice
from unclamp.files import to_json

NARROW = 80


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has snapshots.", parser=here)],
    spike: Annotated[
        int | None,
        typer.Option(
            help="# of the spike in `unclamp spikes`; without, the first of the highest train."
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(
            help="Most replays, however many steps each takes (from an older snapshot more); a "
            "larger budget goes on where a smaller one ended."
        ),
    ] = 100,
    group: Annotated[
        str, typer.Option(help="What is un-clamped together: site, layer, role or projection.")
    ] = "site",
    leading: Annotated[int, typer.Option(help="Sites replayed by themselves.")] = 12,
    at: Annotated[
        int | None,
        typer.Option(
            "--at",
            help="Ask about this step, a spike or not, in place of --spike; also --step N.",
        ),
    ] = None,
    build: Annotated[
        str | None,
        typer.Option(help="MODULE:FUNCTION (or FILE.py:...) that makes the training."),
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(
            help="MODULE:FUNCTION (or FILE.py:...) that does a step; or N, a step to ask about."
        ),
    ] = None,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Go on though code has changed or losses do not come back."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Replay a loss spike with clamping undone, and say what caused it."""
    from unclamp.explain.entry import explain_spike  # noqa: PLC0415
    from unclamp.explain.limits import Limits  # noqa: PLC0415
    from unclamp.explain.text import print_explanation, with_progress  # noqa: PLC0415

    with one_voice():
        at, step_function = _step_meant(at, step or [])
        limits = Limits(replays=budget, leading=leading, group=group, anyway=anyway)  # pyright: ignore
        sys.path.insert(0, os.getcwd())  # as `python -m` does: MODULE lies where the training runs
        found = with_progress(
            lambda show: explain_spike(
                run, spike, at=at, build=build, step=step_function, limits=limits, on_progress=show
            ),
            budget=budget,
            console=Console(stderr=True),
        )
        if as_json:
            typer.echo(to_json(found.to_dict()))
        else:
            print_explanation(found, Console(width=None if sys.stdout.isatty() else NARROW))
        if found.status == "interrupted":
            raise typer.Exit(INTERRUPTED)


def _step_meant(at: int | None, given: list[str]) -> tuple[int | None, str | None]:
    """Return the step asked about and the step function, which is never a whole number."""
    numbers = [int(text) for text in given if text.isdecimal()] + ([] if at is None else [at])
    functions = [text for text in given if not text.isdecimal()]
    if len(numbers) > 1 or len(functions) > 1:
        raise typer.BadParameter(f"expected one step and one step function, got {given!r}")
    return next(iter(numbers), None), next(iter(functions), None)
