"""An explanation on a terminal: the paragraph, the sites, the override; and progress meanwhile."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from unclamp.analysis.counterfactual import PASTE, SiteShare
from unclamp.analysis.explanation import Explanation
from unclamp.analysis.labels import ways
from unclamp.analysis.shares import interval, spike_share
from unclamp.written import counted

SHOWN_ROWS = 12


def print_explanation(found: Explanation, console: Console) -> None:
    """Print what was found; fits 80 columns."""
    console.print(Text(found.stated, style="bold"))
    console.print(Text(found.words()), soft_wrap=False)
    if found.sites:
        console.print()
        console.print(_table(found))
    if found.override is not None:
        console.print(Text(f"\n{PASTE}", style="bold"))
        console.print(Text(found.override.toml), soft_wrap=True)
    console.print(Text(_spent(found), style="dim"))


def _spent(found: Explanation) -> str:
    steps = f" with {counted(found.steps, 'step')} in all" if found.steps else ""
    replays = f"{counted(found.replays, 'replay')} of at most {found.budget}{steps}"
    return f"{replays}, {found.replay_s:.1f} s; a step takes {1e3 * found.step_s:.0f} ms."


def _table(found: Explanation) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("[dim]site[/]", overflow="fold", ratio=1)
    for heading in ("caused", "range", *_ways(found)):
        table.add_column(f"[dim]{heading}[/]", justify="right", no_wrap=True)
    for row in found.sites[:SHOWN_ROWS]:
        table.add_row(*_cells(row), style="bold" if row.named else None)
    if len(found.sites) > SHOWN_ROWS:
        table.add_row(f"... and {len(found.sites) - SHOWN_ROWS} more, in the JSON")
    free, clamped = (" ".join(way.split()) for way in _ways(found))
    table.caption = f"{free}: share gone; {clamped}: share left; bold: to be mended"
    table.caption_justify = "left"
    return table


def _ways(found: Explanation) -> list[str]:
    return [f"only it\n{way}" for way in ways(found.verdict)]


def _cells(row: SiteShare) -> list[str]:
    shares = spike_share(row.share), interval(row), spike_share(row.only), spike_share(row.last)
    return [row.name, *shares]


def with_progress(
    explain: Callable[[Callable[[Explanation], None]], Explanation],
    *,
    budget: int,
    console: Console,
) -> Explanation:
    """Explain with a bar of replays, time left and the answer so far, on this console."""
    columns = (
        TextColumn("replays"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("replays", total=budget, note="")

        def show(found: Explanation) -> None:
            bar.update(task, completed=found.replays, note=_so_far(found))

        return explain(show)


def _so_far(found: Explanation) -> str:
    if found.clamping_share is None:
        return "does it come back?"
    if not found.sites:
        return f"clamping: {spike_share(found.clamping_share)}"
    first = found.sites[0]
    return f"{first.name}: {spike_share(first.share)}"
