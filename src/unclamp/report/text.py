"""The report as tables for a terminal of 80 columns or more; no number is ever cut."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unclamp.names import shown
from unclamp.report.arms import ScenarioView
from unclamp.report.evidence import CAUTION, caution_of
from unclamp.report.glossary import terms_of
from unclamp.report.ranks import RANK_COLUMNS, rank_row
from unclamp.report.recorded import SiteRow
from unclamp.report.runs import RunView
from unclamp.report.view import View
from unclamp.report.words import (
    KIND_COLUMNS,
    SERIES,
    arm_columns,
    arm_notes,
    arm_row,
    kind_rows,
    shortened,
    site_row,
    spike_text,
)

TERMINAL_SITES = 5
TERMINAL_SPIKES = 12
ARM_WIDTH = 24
LEAST_NAME = 8
HEADING = 10
GAP = 2
"""Columns between two columns of a table."""
_SITE_NUMBERS = ("clamped\nelements", "clamped\ncasts", "overshoot", "clamp\nerror",
                 "gradient\nerror", "underflow", "worst\nstep")  # fmt: skip


def print_view(view: View, console: Console) -> None:
    """Print a report's figures; a study's verdict comes first."""
    if view.run is not None:
        _print_notes(view.notes, console)
        console.print(_run(view.run, console.width))
        return
    if view.scenarios:
        first, *others = map(_bullet, view.verdict)
        console.print(first, style="bold")
        console.print(Group(*others))
    _print_notes(view.notes, console)
    for scenario in view.scenarios:
        console.print(_scenario(scenario, console.width))
    if not view.scenarios:
        console.print("No run of this study has recorded anything yet.")
        return
    console.print(_glossary(view.scenarios))


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(Text(note, style="yellow"))


def _glossary(scenarios: Sequence[ScenarioView]) -> RenderableType:
    """Return a line for each term that the tables use; words that explain themselves are left."""
    columns = [column for scenario in scenarios for column in arm_columns(scenario)]
    arms = {arm.name for scenario in scenarios for arm in scenario.arms}
    terms = terms_of([*columns, "clamp error"], also={"hp"} & arms)
    grid = Table.grid(padding=(0, 1))
    for term in terms:
        if term.word not in ("arm", "spike", "final loss"):
            grid.add_row(Text(term.word, style="dim bold"), Text(term.short, style="dim"))
    return Group(Text(), grid)


def _run(run: RunView, width: int) -> RenderableType:
    parts: list[RenderableType] = [Text.assemble("\nrun ", (run.name, "bold"))]
    parts += [_bullet(sentence) for sentence in run.sentences]
    if run.coverage is not None:
        parts.append(_bullet(f"Of the matrix products of a step: {run.coverage.sentence}."))
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
    clamped = [site for site in run.sites if site.clamped_casts and not site.only_counted][
        :TERMINAL_SITES
    ]
    if clamped:
        parts.append(Text("\nworst sites, by total clamp error", style="bold"))
        parts.append(_sites(clamped, width))
    if run.ranks.rows:
        parts.append(Text("\nranks, by largest overshoot where several hold a site", style="bold"))
        rows = [rank_row(row) for row in run.ranks.listed[:TERMINAL_SITES]]
        parts.append(table_of(RANK_COLUMNS, rows, width, longest_name=ARM_WIDTH))
    caution = caution_of(run.association, clamped=bool(clamped))
    if caution == CAUTION:  # an association's own stands among its sentences
        parts.append(Text(f"\n{CAUTION.replace('columns', 'figures')}", style="dim"))
    return Group(*parts)


def _scenario(scenario: ScenarioView, width: int) -> RenderableType:
    title = Text.assemble("\n", (scenario.name, "bold"), f"  {scenario.description}")
    parts: list[RenderableType] = [title, _arms(scenario, width)]
    kinds = kind_rows(scenario)
    if kinds:
        title = "\nloss by kind of batch"
        table = table_of(KIND_COLUMNS, kinds, width, longest_name=ARM_WIDTH)
        parts += [Text(title, style="bold"), table]
    parts += [Text(note, style="yellow") for note in arm_notes(scenario)]
    parts += [_bullet(finding) for finding in scenario.findings]
    for name, sites in scenario.worst.items():
        if sites:
            order = "all seeds, largest total clamp error first"
            parts.append(Text.assemble("\n", (f"worst sites of {name}", "bold"), f"  {order}"))
            parts.append(_sites(sites[:TERMINAL_SITES], width))
    return Group(*parts)


def _arms(scenario: ScenarioView, width: int) -> RenderableType:
    rows = [arm_row(arm, scenario) for arm in scenario.arms]
    return table_of(arm_columns(scenario), rows, width, longest_name=ARM_WIDTH)


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, longest_name: int
) -> RenderableType:
    """Return a table, or several of the same rows one below the other where one is too wide.

    Cells never wrap and are never cut, but for the names in the first column, which are shortened
    to `longest_name` characters, and further where a table of one more column needs it.
    """
    sizes = [_drawn(columns[i], [row[i] for row in rows]) for i in range(len(columns))]
    room = width - GAP - max(sizes[1:], default=0)
    name_width = max(LEAST_NAME, min(longest_name, room))
    rows = [[shortened(row[0], name_width), *row[1:]] for row in rows]
    first = _drawn(columns[0], [row[0] for row in rows])
    parts: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        drawn = first + sum(GAP + sizes[j] for j in [*parts[-1], i])
        if parts[-1] and drawn > width:
            parts.append([])
        parts[-1].append(i)
    parted: list[RenderableType] = []
    for part in parts:
        shown_rows = [[row[0], *(row[i] for i in part)] for row in rows]
        table = _table([columns[0], *(columns[i] for i in part)], shown_rows)
        parted += [Text(), table] if parted else [table]
    return Group(*parted)


def _drawn(column: str, cells: Sequence[str]) -> int:
    """Return the width at which a column is drawn.

    That cuts no cell and no word of the heading, which wraps from `HEADING` characters on.
    """
    least = max(max(map(len, column.split())), *map(len, cells or [""]))
    return max(least, min(HEADING, len(column)))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose cells never wrap; headings do, at their spaces."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        drawn = _drawn(column, [row[i] for row in rows])
        justify = "left" if i == 0 else "right"
        table.add_column(Text(column, style="dim"), justify=justify, width=drawn)
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
    lines = [Text(f"{upper}\n{lower}", style="dim")]
    for site, row in zip(sites, rows, strict=True):
        about = f" {site.role}, {site.scaling} {site.format}"
        name = shortened(shown(site.fqn), max(20, width - len(about)))
        lines.append(Text.assemble((name, "bold"), about))
        lines.append(Text(line(row)))
    return Group(*lines)


def _numbers(site: SiteRow) -> list[str]:
    row = dict(zip(("site", "role", "scaling", *_SITE_NUMBERS), site_row(site), strict=True))
    return [row[name] for name in _SITE_NUMBERS]


def _bullet(sentence: str) -> RenderableType:
    """Return a sentence whose further lines stand under its first word."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row("·", Text(sentence))
    return grid
