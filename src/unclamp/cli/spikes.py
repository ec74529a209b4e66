"""`unclamp spikes`: where the loss or the gradient norm of a run jumped up."""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unclamp.cli.app import JsonFlag, app
from unclamp.cli.places import place
from unclamp.errors import AnalysisError
from unclamp.files import to_json
from unclamp.written import counted, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unclamp.analysis import Curve, Divergence, Spike


class Method(StrEnum):
    """Definitions of a spike."""

    ROBUST = "robust"
    OLMO = "olmo"
    OLMO_CORE = "olmo-core"
    ZCLIP = "zclip"
    MEGATRON = "megatron"


class Series(StrEnum):
    """What is judged."""

    LOSS = "loss"
    GRAD_NORM = "grad_norm"
    BOTH = "both"


@app.command()
def spikes(
    path: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, or its URL; or CSV, JSON lines, trainer_state.json, "
            "TensorBoard events, a console log, also as .gz; - for what comes through a pipe.",
            parser=place,
        ),
    ],
    method: Annotated[Method, typer.Option(help="Definition of a spike.")] = Method.ROBUST,
    series: Annotated[Series, typer.Option(help="What to judge.")] = Series.BOTH,
    column: Annotated[
        str | None, typer.Option(help="Column or tag to take for the loss.", show_default=False)
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Column that holds the kind of each step's batch, each judged by itself; a run "
            "has its own.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split to read, such as val; what is called training by default.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Run to read, where a file holds several: its name, or COLUMN=VALUE.",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="For text: finds a record in a line; its groups (?P<loss>...), (?P<step>...), "
            "(?P<grad_norm>...) are the values.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Go on reading as the file grows, and tell each new spike; until Ctrl-C.",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(help="In the method's unit; its own by default.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the upward spikes of a run's loss and gradient norm, and slow divergences of the loss.

    The number of a spike of the loss is the K of `unclamp explain RUN --spike K`.
    """
    from unclamp.analysis import find_divergences, find_spikes, read_curve  # noqa: PLC0415

    if follow:
        from unclamp.analysis.selections import Choice  # noqa: PLC0415
        from unclamp.cli.following import follow_spikes  # noqa: PLC0415

        curve = follow_spikes(
            path,
            Choice(column=column, split=split, run=run, pattern=pattern, group=group),
            lambda growing: _spikes_so_far(growing, column, method, series, threshold),
            tell=_tell_as_json if as_json else None,
        )
        if as_json:
            return
    else:
        curve = read_curve(path, column=column, split=split, run=run, pattern=pattern, group=group)
    names = [name for name in curve.series if series in (Series.BOTH, name)]
    if not names:
        raise AnalysisError(f"{path} has no {series}; it has {list(curve.series)}")
    # What the user named goes by that name.
    labels = {name: curve.columns[name] if column and name == "loss" else name for name in names}
    found = {
        name: find_spikes(
            curve.series[name],
            steps=curve.steps,
            groups=curve.groups,
            method=method,
            threshold=threshold,
            series=labels[name],
        )
        for name in names
    }
    ordered = sorted((s for each in found.values() for s in each), key=lambda spike: spike.onset)
    # Of the loss alone: a healthy gradient norm may rise slowly.
    drifts = [
        drift
        for name in names
        if name == "loss"
        for drift in find_divergences(
            curve.series[name], steps=curve.steps, groups=curve.groups, series=labels[name]
        )
    ]
    if as_json:
        for note in curve.notes:
            typer.echo(note, err=True)
        each = sorted([*ordered, *drifts], key=lambda one: one.onset)
        typer.echo(to_json([one.to_dict() | _place(curve, one) for one in each]))
        return
    typer.echo(f"{curve.source}: {', '.join(curve.columns[name] for name in names)}", err=True)
    if ordered:
        _print_table(ordered, curve)
    for note in curve.notes:
        typer.echo(note)
    for drift in drifts:
        typer.echo(_drift_in_words(curve, drift))
    for name in names:
        values = curve.series[name]
        for line in _lines(labels[name], values, curve.groups, found[name], method, threshold):
            typer.echo(line)


def _spikes_so_far(
    curve: "Curve", column: str | None, method: Method, series: Series, threshold: float | None
) -> "list[Spike]":
    """Return the spikes of a growing curve, by onset."""
    from unclamp.analysis import find_spikes  # noqa: PLC0415

    found = [
        spike
        for name in curve.series
        if series in (Series.BOTH, name)
        for spike in find_spikes(
            curve.series[name],
            steps=curve.steps,
            groups=curve.groups,
            method=method,
            threshold=threshold,
            series=curve.columns[name] if column and name == "loss" else name,
        )
    ]
    return sorted(found, key=lambda spike: spike.onset)


def _tell_as_json(curve: "Curve", spike: "Spike") -> None:
    """Print one spike as a line of JSON."""
    typer.echo(to_json(spike.to_dict() | _place(curve, spike), indent=None))


def _place(curve: "Curve", found: "Spike | Divergence") -> dict[str, str]:
    """Return what the source calls the onset, where it does not count steps through."""
    return {"place": curve.places[found.onset]} if curve.places else {}


def _drift_in_words(curve: "Curve", drift: "Divergence") -> str:
    from unclamp.analysis.divergences import divergence_in_words  # noqa: PLC0415

    return divergence_in_words(
        drift, at=lambda step: curve.places[step] if curve.places else f"step {step}"
    )


def _print_table(found: "list[Spike]", curve: "Curve") -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None)
    table.add_column("#", justify="right")
    table.add_column("series")
    for name in ("onset", "peak", "end", "recovery", "height", "sigmas"):
        table.add_column(name, justify="right")
    table.add_column("kind")
    if curve.groups:
        table.add_column("group")
    if curve.places:
        table.add_column("place of the onset")
    for spike in found:
        recovery = "never" if spike.recovery is None else str(spike.recovery)
        table.add_row(
            "" if spike.number is None else str(spike.number),
            spike.series,
            *(str(step) for step in (spike.onset, spike.peak, spike.end)),
            recovery,
            times(spike.height) if math.isfinite(spike.height) else "-",
            f"{spike.sigmas:.1f}" if math.isfinite(spike.sigmas) else "-",
            spike.kind,
            *([spike.group or "-"] if curve.groups else []),
            *_place(curve, spike).values(),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _lines(
    label: str,
    values: "Sequence[float | None]",
    groups: "Sequence[str | None]",
    found: "list[Spike]",
    method: Method,
    threshold: float | None,
) -> list[str]:
    """Return the last lines, one for each of the largest kinds of batches, and one for the rest."""
    from unclamp.analysis.groups import MOST_KINDS, kind_in_words, largest_kinds  # noqa: PLC0415
    from unclamp.analysis.unjudged import is_judged, why_unjudged  # noqa: PLC0415

    if not groups:
        return [_in_words(label, values, found, method, threshold)]
    said, rest = [], _Rest()
    for group, places in largest_kinds(groups).items():
        own = [value for i in places if (value := values[i]) is not None]
        spikes = [spike for spike in found if spike.group == group]
        judged = is_judged(own, method=method, threshold=threshold)
        name = f"{label}, {kind_in_words(group)}"
        if len(said) == MOST_KINDS:
            rest.add(steps=len(own), spikes=len(spikes), is_judged=judged)
        elif judged:
            said.append(_in_words(name, own, spikes, method, threshold))
        else:
            said.append(f"{name}: not judged: {why_unjudged(own)} (method {method}).")
    return [*said, f"{label}, and {rest.words()} (method {method})."] if rest.kinds else said


@dataclass
class _Rest:
    """The kinds that have no line of their own, added up."""

    kinds: int = 0
    unjudged: int = 0
    steps: int = 0
    spikes: int = 0

    def add(self, *, steps: int, spikes: int, is_judged: bool) -> None:
        self.kinds += 1
        self.unjudged += not is_judged
        self.steps += steps
        self.spikes += spikes

    def words(self) -> str:
        spikes = counted(self.spikes, "spike") if self.spikes else "no spikes"
        few = f"; {self.unjudged:,} of the kinds not judged" if self.unjudged else ""
        return f"{counted(self.kinds, 'more kind')}: {spikes} in {counted(self.steps, 'step')}{few}"


def _in_words(
    label: str,
    series: "Sequence[float | None]",
    found: "list[Spike]",
    method: Method,
    threshold: float | None,
) -> str:
    """Return a last line: how many spikes in how many steps, and what could have been missed."""
    from unclamp.analysis import DEFINITIONS, smallest_height, spike_score  # noqa: PLC0415

    values = [value for value in series if value is not None]
    count = f"{len(found) or 'no'} spike{'' if len(found) == 1 else 's'}"
    definition = DEFINITIONS[method]
    used = definition.threshold if threshold is None else threshold
    steps = f"{len(values)} step{'' if len(values) == 1 else 's'}"
    words = f"{label}: {count} in {steps} (method {method}, threshold {used:g})."
    least = smallest_height(values, method=method, threshold=threshold)
    if math.isfinite(least):
        words += f" One step at {times(least)} the level or more would show; less may be missed."
    elif all(value > 0 for value in values if math.isfinite(value)):
        judged = "a finite value: only NaN and Inf count" if found else "any"
        words += f" There are too few steps for this method to judge {judged}."
    else:
        words += " Values at or below zero have no ratio; heights are in sigmas."
    score = spike_score(values)
    if math.isfinite(score):
        return f"{words} OLMo spike score: {100 * score:.3g} %."
    return words
