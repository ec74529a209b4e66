"""A comparison of runs in a terminal of 80 columns or more; no number is ever cut."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from unclamp.names import shown
from unclamp.report.side_by_side.comparison import Comparison
from unclamp.report.side_by_side.settings import Setting
from unclamp.report.side_by_side.sites import SiteRowOfArms
from unclamp.report.side_by_side.words import (
    DIFFERENCE_COLUMNS,
    KIND_COLUMNS,
    RUN_COLUMNS,
    SITE_FIGURES,
    difference_row,
    kind_row,
    run_row,
    site_figures,
)
from unclamp.report.text import _bullet, table_of
from unclamp.report.words import shortened

MOST_SITES = 12
MOST_LINES = 40
"""Lines of the table of sites; with many arms fewer sites are listed."""
NAME_WIDTH = 22


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison's figures, its verdict and limits first."""
    width = console.width
    parts: list[RenderableType] = [_title(f"{len(comparison.runs)} runs side by side")]
    parts += [_bullet(sentence) for sentence in comparison.verdict]
    if comparison.limits:
        parts.append(_title("limits"))
        parts += [_bullet(sentence) for sentence in comparison.limits]
    if comparison.differences:
        parts.append(_title(f"loss against {comparison.baseline}, at common steps"))
        rows = [difference_row(found) for found in comparison.differences]
        parts.append(table_of(DIFFERENCE_COLUMNS, rows, width, longest_name=NAME_WIDTH))
    if comparison.kinds:
        parts.append(_title(f"loss by kind of batch against {comparison.baseline}, common steps"))
        rows = [kind_row(found) for found in comparison.kinds]
        parts.append(table_of(KIND_COLUMNS, rows, width, longest_name=NAME_WIDTH))
    parts.append(_title("runs"))
    runs = [run_row(run) for run in comparison.runs]
    parts.append(table_of(RUN_COLUMNS, runs, width, longest_name=NAME_WIDTH))
    if comparison.settings:
        parts.append(_title("what differs"))
        parts += _settings(comparison.settings, list(comparison.arms))
    parts += _sites(comparison, width)
    console.print(Group(*parts))


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _settings(settings: Sequence[Setting], arms: Sequence[str]) -> list[RenderableType]:
    """Return two arms as a change on one line, several as a line each."""
    if len(arms) == 2:
        return [_bullet(setting.change(arms[1], arms[0])) for setting in settings]
    lines: list[RenderableType] = []
    for setting in settings:
        lines.append(_bullet(f"{setting.where} {setting.name}".rstrip()))
        widest = min(NAME_WIDTH, max(map(len, arms)))
        for arm, value in setting.shown.items():
            lines.append(Text(f"    {shortened(arm, widest):{widest}}  {value}"))
    return lines


def _sites(comparison: Comparison, width: int) -> list[RenderableType]:
    telling = [row for row in comparison.sites if row.is_clamped]
    if not telling:
        return []
    most = max(3, min(MOST_SITES, MOST_LINES // (len(comparison.arms) + 1)))
    listed = telling[:most]
    title = "sites, largest difference of clamp error a recorded cast first"
    parts: list[RenderableType] = [_title(title), _site_lines(listed, width)]
    if len(telling) > len(listed):
        parts.append(Text(f"  and {len(telling) - len(listed):,} more that clamped: --json"))
    return parts


def _site_lines(rows: Sequence[SiteRowOfArms], width: int) -> RenderableType:
    """Return each site as its name on one line, and its figures in each arm on the next ones."""
    cells = [[site_figures(loss) for loss in row.arms.values()] for row in rows]
    arms = [shortened(arm, NAME_WIDTH) for arm in rows[0].arms]
    first = max(map(len, arms)) + 2
    sizes = [
        max(len(head), *(len(arm[i]) for row in cells for arm in row)) + 2
        for i, head in enumerate(SITE_FIGURES)
    ]

    def line(name: str, figures: Sequence[str]) -> str:
        numbers = (text.rjust(size) for text, size in zip(figures, sizes, strict=True))
        return f"  {name:{first}}" + "".join(numbers)

    lines = [Text(line("", SITE_FIGURES), style="dim")]
    for row, figures in zip(rows, cells, strict=True):
        about = f" {row.role}"
        name = shortened(shown(row.fqn), max(20, width - len(about)))
        lines.append(Text.assemble((name, "bold"), about))
        lines += [Text(line(arm, each)) for arm, each in zip(arms, figures, strict=True)]
    return Group(*lines)
