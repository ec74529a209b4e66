"""`unclamp spikes --follow`: each new spike of a growing file, once, as soon as it is certain."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from unclamp.written import times

if TYPE_CHECKING:
    from unclamp.analysis import Curve, Spike
    from unclamp.analysis.selections import Choice


def follow_spikes(
    path: Path,
    choice: "Choice",
    find: "Callable[[Curve], list[Spike]]",
    *,
    tell: "Callable[[Curve, Spike], None] | None" = None,
    stop: threading.Event | None = None,
    every: float = 1.0,
) -> "Curve":
    """Print the spikes of a growing file until Ctrl-C or the end of a pipe; return its curve.

    A spike is certain once a later step was recorded: a step may be written twice, and the last
    record counts. It is told once; again only if the run went back and rose there anew.

    Args:
        path: What to follow.
        choice: What is asked for of it.
        find: Gives the spikes of a curve.
        tell: Prints one spike; a line of words by default.
        stop: Ends the following, as Ctrl-C does.
        every: Seconds between two looks.

    Raises:
        AnalysisError: There is no curve in the end, or an ambiguous one.
    """
    from unclamp.analysis.following import follow_curve  # noqa: PLC0415

    told: set[tuple[str, int, str]] = set()
    stop = stop or threading.Event()
    latest = None
    with _stopping_at_ctrl_c(stop):
        for curve in follow_curve(path, choice, stop=stop, every=every):
            latest = curve
            for spike in find(curve):
                key = (spike.series, spike.onset, _value_at(curve, spike.onset))
                if key not in told and _is_certain(curve, spike):
                    told.add(key)
                    (tell or _tell)(curve, spike)
    assert latest is not None  # follow_curve raises without a curve
    return latest


def _is_certain(curve: "Curve", spike: "Spike") -> bool:
    return spike.onset < int(curve.steps[-1])


def _value_at(curve: "Curve", step: int) -> str:
    """Return what was recorded at a step, as text: a NaN equals itself."""
    place = int(curve.steps.searchsorted(step))
    return str([values[place] for values in curve.series.values()])


def _tell(curve: "Curve", spike: "Spike") -> None:
    place = f" ({curve.places[spike.onset]})" if curve.places else ""
    number = "" if spike.number is None else f" {spike.number}"
    high = "not finite" if spike.kind == "nonfinite" else f"{times(spike.height)} the level so far"
    typer.echo(f"Step {spike.onset}{place}: spike{number} of {spike.series}, {high}.")


@contextmanager
def _stopping_at_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """While entered, Ctrl-C sets an event; where it is ignored, as under nohup, it stays so."""

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is signal.SIG_IGN or not in_main_thread:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
