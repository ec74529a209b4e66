"""`unclamp whatif`: what would other policies have done to the casts of a run?"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unclamp.cli.app import USER_ERROR, JsonFlag, app
from unclamp.cli.places import RunArgument
from unclamp.files import to_json

if TYPE_CHECKING:
    from unclamp.analysis.whatif import Outcome, WhatIf

DEFAULT = ("delayed", "delayed(1024)", "guarded", "dynamic")
MOST_SHOWN = 12
WIDEST_POLICY = 40
"""Characters of a policy from which on it is shortened."""


@app.command()
def whatif(
    path: RunArgument,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help='A policy, such as "delayed(history_len=1024)"; repeat it for several. '
            f"By default {', '.join(DEFAULT)}.",
        ),
    ] = None,
    with_grid: Annotated[
        bool, typer.Option("--grid", help="About 200 policies; prints those that none beats.")
    ] = False,
    site: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help='Only these sites, such as "*.down_proj" or "weight".'),
    ] = None,
    by_site: Annotated[
        bool, typer.Option("--by-site", help="The worst sites of each policy as well.")
    ] = False,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1e-3, metavar="GB/S", help="Price reads in milliseconds, at so much."),
    ] = None,
    element_bytes: Annotated[
        float, typer.Option(min=0.1, metavar="N", help="Bytes of an element that a cast reads.")
    ] = 2,
    as_json: JsonFlag = False,
) -> None:
    """Say what other ways to scale would have clamped in a run, and what they would have cost."""
    from unclamp.analysis.whatif import evaluate, grid, parse_policy  # noqa: PLC0415
    from unclamp.runlog import RunLog  # noqa: PLC0415

    if with_grid and policies:
        typer.echo("unclamp: give --grid or --policy, not both", err=True)
        raise typer.Exit(USER_ERROR)
    asked = grid() if with_grid else [parse_policy(text) for text in policies or DEFAULT]
    with RunLog.open(path) as log:
        found = evaluate(log, asked, site=site)
    if as_json:
        data = found.to_dict()
        for one, outcome in zip(data["policies"], found.outcomes, strict=True):
            one["extra_bytes"] = outcome.extra_bytes(element_bytes)
            one["extra_ms_per_step"] = _ms(found, outcome, element_bytes, bandwidth)
        typer.echo(to_json(data))
        return
    console = Console(highlight=False, markup=False)
    for sentence in found.limits:
        console.print(f"- {sentence}")
    console.print()
    shown = _thinned(found.frontier) if with_grid else list(found.outcomes)
    _print_table(console, found, shown, element_bytes=element_bytes, bandwidth=bandwidth)
    if with_grid:
        from unclamp.written import counted  # noqa: PLC0415

        console.print(
            f"\n{len(shown)} of {counted(len(found.frontier), 'policy', 'policies')}, of "
            f"{len(found.outcomes)} tried, that no other beats in reads, clamped casts and "
            "underflow at once."
        )
    if by_site:
        _print_sites(console, shown)


def _ms(
    found: "WhatIf", outcome: "Outcome", element_bytes: float, bandwidth: float | None
) -> float | None:
    if bandwidth is None:
        return None
    return outcome.extra_bytes(element_bytes) / found.steps / bandwidth / 1e6


def _thinned(outcomes: list["Outcome"]) -> list["Outcome"]:
    """Return at most `MOST_SHOWN`, those of which the fewest casts clamp at each price."""
    if len(outcomes) <= MOST_SHOWN:
        return outcomes
    step = (len(outcomes) - 1) / (MOST_SHOWN - 1)
    return [outcomes[round(i * step)] for i in range(MOST_SHOWN)]


def _print_table(
    console: Console,
    found: "WhatIf",
    outcomes: list["Outcome"],
    *,
    element_bytes: float,
    bandwidth: float | None,
) -> None:
    from unclamp.report.text import table_of  # noqa: PLC0415
    from unclamp.written import listed, percent  # noqa: PLC0415

    names = ["clamped", "overshoot", "re-cast", "reads", "underflow", "clamp error"]
    names += [] if bandwidth is None else ["ms"]
    own = found.recorded
    recast = percent(own.recast / own.casts) if own.casts else ""
    figures = [f"{own.clamped:,}", "", recast, f"{own.reads:.3f}", *[""] * (len(names) - 4)]
    rows = [[f"recorded: {listed(own.scalings)}", *figures]]
    for outcome in outcomes:
        lost = outcome.lost
        row = [
            outcome.text,
            f"{outcome.clamped:,}",
            f"{outcome.overshoot:.2f}x" if outcome.overshoot else "-",
            percent(outcome.recast / outcome.casts) if outcome.policy.guards else "-",
            f"{outcome.reads:.3f}",
            "?" if lost is None else percent(lost.underflow.value),
            "-" if lost is None or not lost.clamped_casts else percent(lost.clamp_error.value),
        ]
        if bandwidth is not None:
            row.append(f"{_ms(found, outcome, element_bytes, bandwidth):.3g}")
        rows.append(row)
    columns = ["policy", *names]
    console.print(table_of(columns, rows, console.width, longest_name=WIDEST_POLICY))
    casts = max(outcome.casts for outcome in outcomes)
    console.print(
        f"\nClamped: of {casts:,} casts in {found.steps:,} steps. Overshoot: the largest. "
        "Reads: of each element that is cast. "
        "Underflow: mean over inspected casts; clamp error: over those of them that clamp "
        "(estimates; --json gives their intervals)."
        + ("" if bandwidth is None else " ms: of reads beyond the first, a step.")
    )


def _print_sites(console: Console, outcomes: list["Outcome"]) -> None:
    for outcome in outcomes:
        worst = sorted(outcome.sites, key=lambda s: (-s.clamped, -s.recast))[:MOST_SHOWN]
        console.print(f"\n{outcome.text}")
        if not any(each.clamped or each.recast for each in worst):
            console.print("  no site clamps, and none is cast again")
        for each in worst:
            if each.clamped or each.recast:
                what = f"{each.recast:,} re-cast" if each.recast else f"{each.clamped:,} clamped"
                first = "" if each.first_clamp is None else f", first at step {each.first_clamp:,}"
                over = f", up to {each.overshoot:.2f}x" if each.clamped else ""
                name = f"{each.site.fqn or '(the model itself)'} {each.site.role}"
                console.print(f"  {name}: {what} of {each.casts:,} casts{over}{first}")
