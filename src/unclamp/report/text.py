"""The report as tables for a terminal of 80 columns or more; no number is ever cut."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unclamp.names import shown
from unclamp.report.arms import ScenarioView
from unclamp.report.evidence import CAUTION, PAPER
from unclamp.report.recorded import SiteRow
from unclamp.report.runs import RunView
from unclamp.report.view import View
from unclamp.report.words import (
    SERIES,
    arm_columns,
    arm_row,
    shortened,
    site_row,
    spike_text,
)

TERMINAL_SITES = 5
TERMINAL_SPIKES = 12
WIDE_TABLE = 120
"""Columns that the table of arms needs as one table."""
ARM_WIDTH = 24
_SITE_NUMBERS = ("saturated", "clamped\ncasts", "overshoot", "clamp\nerror", "underflow",
                 "worst\nstep")  # fmt: skip


def print_view(view: View, console: Console) -> None:
    """Print a report's figures."""
    for note in view.notes:
        console.print(Text(note, style="yellow"))
    if view.run is not None:
        console.print(_run(view.run, console.width))
        return
    for scenario in view.scenarios:
        console.print(_scenario(scenario, console.width))
    if not view.scenarios:
        console.print("No run of this study has recorded anything yet.")


def _run(run: RunView, width: int) -> RenderableType:
    parts: list[RenderableType] = [Text.assemble("\nrun ", (run.name, "bold"))]
    parts += [_bullet(sentence) for sentence in run.sentences]
    if run.spikes:
        listed = run.spikes[:TERMINAL_SPIKES]
        parts.append(Text("\nspikes", style="bold"))
        parts += [_bullet(f"{SERIES[s['series']]}: {spike_text(s)}") for s in listed]
        if len(listed) < len(run.spikes):
            parts.append(Text(f"  and {len(run.spikes) - len(listed)} more: unclamp spikes RUN"))
    if run.association is not None:
        parts.append(Text("\ndid spikes follow clamping?", style="bold"))
        parts += [_bullet(sentence) for sentence in run.association.get("sentences", [])]
    for found in run.explanations:
        parts.append(Text(f"\nreplay {found.name}", style="bold"))
        parts += [_bullet(sentence) for sentence in found.sentences]
    clamped = [site for site in run.sites if site.saturated][:TERMINAL_SITES]
    if clamped:
        parts.append(Text("\nworst sites, by total clamp error", style="bold"))
        parts.append(_sites(clamped, width))
    said = (run.association or {}).get("sentences", [])
    if not any(PAPER in sentence for sentence in said):
        parts.append(Text(f"\n{CAUTION.replace('columns', 'figures')}", style="dim"))
    return Group(*parts)


def _scenario(scenario: ScenarioView, width: int) -> RenderableType:
    title = Text.assemble("\n", (scenario.name, "bold"), f"  {scenario.description}")
    parts: list[RenderableType] = [title, *_arms(scenario, width)]
    parts += [_bullet(finding) for finding in scenario.findings]
    for name, sites in scenario.worst.items():
        if sites:
            parts.append(Text(f"\nworst sites of {name}, all seeds", style="bold"))
            parts.append(_sites(sites[:TERMINAL_SITES], width))
    return Group(*parts)


def _arms(scenario: ScenarioView, width: int) -> list[RenderableType]:
    """Return the table of arms; in a narrow terminal as two tables of the same rows."""
    columns = arm_columns(scenario)
    rows = [arm_row(arm, scenario) for arm in scenario.arms]
    for row in rows:
        row[0] = shortened(row[0], ARM_WIDTH)
    if width >= WIDE_TABLE:
        return [_table(columns, rows)]
    cut = columns.index("spikes: planted + other") + 1
    second = [[row[0], *row[cut:]] for row in rows]
    return [
        _table(columns[:cut], [row[:cut] for row in rows]),
        Text(),
        _table([columns[0], *columns[cut:]], second),
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose cells never wrap; headings do, at their spaces."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        widest = max((len(row[i]) for row in rows), default=0)
        words = max(len(word) for word in column.split())
        table.add_column(
            Text(column, style="dim"),
            justify="left" if i == 0 else "right",
            min_width=max(widest, words),
            max_width=max(widest, words, 10),
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _sites(sites: Sequence[SiteRow], width: int) -> RenderableType:
    """Return each site as its name on one line and its figures on the next, in columns."""
    rows = [_numbers(site) for site in sites]
    heads = [name.split("\n") for name in _SITE_NUMBERS]
    sizes = [
        max(*(len(row[i]) for row in rows), *map(len, heads[i])) + 2 for i in range(len(heads))
    ]

    def line(cells: Sequence[str]) -> str:
        return "".join(cell.rjust(size) for cell, size in zip(cells, sizes, strict=True))

    upper = line([head[0] if len(head) > 1 else "" for head in heads])
    lower = line([head[-1] for head in heads])
    lines = [Text(f"{upper}\n{lower}", style="dim", no_wrap=True)]
    for site, row in zip(sites, rows, strict=True):
        about = f" {site.role}, {site.scaling} {site.format}"
        name = shortened(shown(site.fqn), max(20, width - len(about)))
        lines.append(Text.assemble((name, "bold"), about))
        lines.append(Text(line(row), no_wrap=True))
    return Group(*lines)


def _numbers(site: SiteRow) -> list[str]:
    row = dict(zip(("site", "role", "scaling", *_SITE_NUMBERS), site_row(site), strict=True))
    return [row[name] for name in _SITE_NUMBERS]


def _bullet(sentence: str) -> RenderableType:
    """Return a sentence whose further lines stand under its first word."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row("·", Text(sentence))
    return grid
