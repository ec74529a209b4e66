"""Traps and their outcomes for a terminal: a table of all, and a screen for each one."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unclamp.written import counted

STYLES = {"as documented": "green", "not as documented": "bold red", "failed": "bold red"}
LABEL = 11
MANY = 6


def print_list(traps: list[dict[str, Any]], console: Console) -> None:
    """Print names and beliefs."""
    console.print(_grid([(trap["name"], trap["belief"]) for trap in traps]))


def print_findings(found: dict[str, Any], console: Console, *, screens: bool) -> None:
    """Print a table of what was found; before it a screen of each trap, or of each bad one."""
    build, traps = found["build"], found["traps"]
    for trap in traps:
        if screens or trap["outcome"]["verdict"] in ("not as documented", "failed"):
            _print_screen(trap, console)
    if len(traps) > 1:
        console.print(_table(traps))
    console.print(Text(f"\n{summary(traps)}", style="bold"))
    console.print(
        f"torch {build['torch']}, unclamp {build['unclamp']}, {build['machine']}", highlight=False
    )


def summary(traps: list[dict[str, Any]]) -> str:
    """Return how many of the experiments had which verdict, in one sentence."""
    verdicts = [trap["outcome"]["verdict"] for trap in traps]
    parts = [f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)]
    return f"{counted(len(verdicts), 'experiment')}: {', '.join(parts)}."


def _print_screen(trap: dict[str, Any], console: Console) -> None:
    outcome = trap["outcome"]
    title = Text.assemble((trap["name"], "bold"), f"  on {outcome['device']}: ", _verdict(outcome))
    console.print(title)
    console.print(_labelled([("believed", trap["belief"]), ("in truth", trap["truth"])]))
    console.print()
    # Not wrapped by us, so that what is copied from a narrow terminal still runs.
    console.print(Text(trap["code"].rstrip(), style="cyan"), soft_wrap=True, highlight=False)
    console.print()
    rows = _found(outcome["facts"])
    if outcome["reason"]:
        rows.append(("reason", outcome["reason"]))
    rows += [("but", difference) for difference in outcome["differences"]]
    rows.append(("documented", _documented(trap, outcome)))
    rows += [("costs", trap["cost"]), ("unclamp", f"{trap['remedy']} See {trap['see']}.")]
    console.print(_labelled(rows))
    console.print()


def _found(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a line of each fact, or of all where they are many."""
    if len(facts) > MANY:
        return [("found", _facts(facts))]
    return [("" if i else "found", _facts({name: facts[name]})) for i, name in enumerate(facts)]


def _documented(trap: dict[str, Any], outcome: dict[str, Any]) -> str:
    if outcome["versions"]:
        if outcome["verdict"] == "as documented":
            return f"the same, for {outcome['versions']}"
        return f"for {outcome['versions']}: {_facts(outcome['expected'])}"
    if not trap["documented"]:
        return "nothing"
    known = (f"{each['versions']} on {each['device']}" for each in trap["documented"])
    return f"nothing for this build and device, but for {'; '.join(known)}"


def _facts(facts: dict[str, Any]) -> str:
    return "; ".join(f"{name} = {_figure(value)}" for name, value in facts.items())


def _figure(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _verdict(outcome: dict[str, Any]) -> Text:
    verdict = outcome["verdict"]
    return Text(verdict, style=STYLES.get(verdict, "yellow"))


def _table(traps: list[dict[str, Any]]) -> RenderableType:
    table = Table("trap", "on", "behaves", "found", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for trap in traps:
        outcome = trap["outcome"]
        found = outcome["reason"] or _told(outcome["facts"], trap["telling"])
        table.add_row(trap["name"], outcome["device"], _verdict(outcome), Text(found))
    return table


def _told(facts: dict[str, Any], telling: str) -> str:
    """Return the one fact for which a table has room."""
    name = telling if telling in facts else next(iter(facts), None)
    return "" if name is None else _facts({name: facts[name]})


def _labelled(rows: list[tuple[str, str]]) -> RenderableType:
    return Group(_grid([(f"{label:{LABEL}}", text) for label, text in rows], style="dim"))


def _grid(rows: list[tuple[str, str]], style: str = "bold") -> RenderableType:
    """Return lines whose second part wraps under itself."""
    grid = Table.grid(padding=(0, 1))
    for first, second in rows:
        grid.add_row(Text(first, no_wrap=True, style=style), Text(second))
    return grid
