"""An explanation on a terminal: the paragraph, the sites, the override; and progress meanwhile."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from unclamp.explain.explanation import Explanation, SiteShare, percent

SHOWN_ROWS = 12


def print_explanation(found: Explanation, console: Console) -> None:
    """Print what was found; fits 80 columns."""
    console.print(Text(f"{found.verdict}", style="bold"))
    console.print(Text(found.words()), soft_wrap=False)
    if found.sites:
        console.print()
        console.print(_table(found))
    if found.override is not None:
        where = "at the head of the recipe's overrides"
        console.print(Text(f"\nTo paste, {where}:", style="bold"))
        console.print(Text(found.override.toml), soft_wrap=True)
    spent = f"{found.replays} replays of at most {found.budget}, {found.replay_s:.1f} s"
    console.print(Text(f"{spent}; a step takes {1e3 * found.step_s:.0f} ms.", style="dim"))


def _table(found: Explanation) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading, justify in (
        ("site", "left"),
        ("caused", "right"),
        ("95 %", "right"),
        ("only it un-clamped", "right"),
        ("only it clamped", "right"),
        ("overshoot", "right"),
    ):
        table.add_column(f"[dim]{heading}[/]", justify=justify)  # pyright: ignore
    for row in found.sites[:SHOWN_ROWS]:
        table.add_row(*_cells(row), style="bold" if row.named else None)
    if len(found.sites) > SHOWN_ROWS:
        table.add_row(f"... and {len(found.sites) - SHOWN_ROWS} more, in the JSON")
    return table


def _cells(row: SiteShare) -> list[str]:
    interval = f"{percent(row.low)} to {percent(row.high)}"
    return [
        row.name,
        percent(row.share),
        interval if row.how == "shapley" else f"({interval})",
        "-" if row.only is None else f"-{percent(row.only)}" if row.only > 0 else "0 %",
        "-" if row.last is None else percent(row.last),
        f"{row.overshoot:.1f}x" if row.overshoot else "-",
    ]


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
        return f"clamping: {percent(found.clamping_share)}"
    first = found.sites[0]
    return f"{first.name}: {percent(first.share)}"
