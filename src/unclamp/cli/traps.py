"""`unclamp traps`: FP8's and PyTorch's numerical traps, tried on this machine."""

from typing import Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.files import to_json

NOT_AS_DOCUMENTED = 1


@app.command()
def traps(
    name: Annotated[
        str | None, typer.Argument(help="A trap's name, or a glob such as 'scal*'; all without it.")
    ] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Name them and run none.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Try PyTorch's numerical traps here, and compare with what is documented.

    With a name, each trap is shown with the lines that run.

    Ends with exit code 1 if one does not behave as documented for this torch.
    """
    from unclamp.report.traps import print_findings, print_list  # noqa: PLC0415
    from unclamp.traps import find, run  # noqa: PLC0415 - torch takes a while
    from unclamp.traps.findings import described, findings  # noqa: PLC0415

    chosen = find(name or "*")
    if as_list:
        listed = [described(trap) for trap in chosen]
        if as_json:
            typer.echo(to_json(listed))
            return
        print_list(listed, Console())
        return
    if len(chosen) > 1:
        within = "about" if name is None else "less than"
        typer.echo(f"unclamp: running {len(chosen)} experiments, in {within} a minute", err=True)
    outcomes = run(chosen)
    found = findings(outcomes)
    if as_json:
        typer.echo(to_json(found))
    else:
        print_findings(found, Console(), screens=name is not None)
        if name is None:
            typer.echo("`unclamp traps NAME` shows one, with the lines that ran.")
    if not found["behave"]:
        raise typer.Exit(NOT_AS_DOCUMENTED)
