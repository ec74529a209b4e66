"""The report as tables for a terminal."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unclamp.report.arms import ScenarioView
from unclamp.report.view import View
from unclamp.report.words import SITE_COLUMNS, arm_columns, arm_row, site_row

TERMINAL_SITES = 5


def print_view(view: View, console: Console) -> None:
    """Print a report's figures."""
    for scenario in view.scenarios:
        console.print(_scenario(scenario))
    if view.status != "finished":
        console.print(f"[yellow]This is {view.status}: the figures are of what is there so far.[/]")


def _scenario(scenario: ScenarioView) -> RenderableType:
    title = Text.assemble("\n", (scenario.name, "bold"), f"  {scenario.description}")
    arms = Table(*_headings(arm_columns(scenario)), box=None, pad_edge=False)
    for arm in scenario.arms:
        arms.add_row(*arm_row(arm, scenario))
    parts: list[RenderableType] = [title, arms, *(Text(f"· {f}") for f in scenario.findings)]
    for name, sites in scenario.worst.items():
        if not sites:
            continue
        table = Table(*_headings(list(SITE_COLUMNS)), box=None, pad_edge=False)
        for site in sites[:TERMINAL_SITES]:
            table.add_row(*site_row(site))
        parts += [Text(f"\nworst sites of {name}, all seeds", style="bold"), table]
    return Group(*parts)


def _headings(columns: list[str]) -> list[str]:
    return [f"[dim]{column}[/]" for column in columns]
