"""Around which steps a log that is thinned stays whole: its spikes and its events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unclamp.analysis.curves import run_curve
from unclamp.analysis.spikes import find_spikes
from unclamp.errors import AnalysisError
from unclamp.runlog import Compacted, Keep, RunLog, compact


def compact_run(
    path: Path,
    keep: Keep | None,
    *,
    is_tried: bool = False,
    on_part: Callable[[int, int], None] = lambda done, parts: None,
) -> Compacted:
    """Thin the casts of a run, as `unclamp.runlog.compact`, and keep what lies around its spikes.

    Args:
        path: The run.
        keep: What stays; None to leave out nothing.
        is_tried: Whether only to say what it would do.
        on_part: Told after each part how many of how many are done.

    Raises:
        RunLogError: As `unclamp.runlog.compact`.
    """
    near = [] if keep is None else steps_of_interest(path)
    return compact(path, keep, near=near, is_tried=is_tried, on_part=on_part)


def steps_of_interest(path: Path) -> list[int]:
    """Return the onsets and peaks of a run's spikes, and the steps of its events, rising.

    Raises:
        RunLogError: It is no run, or cannot be read.
    """
    with RunLog.open(path) as log:
        steps = set(log.sql("SELECT DISTINCT step FROM events")["step"].to_pylist())
        try:
            curve = run_curve(log)
        except AnalysisError:  # neither loss nor gradient norm
            return sorted(steps)
    for name, values in curve.series.items():
        found = find_spikes(values, steps=curve.steps, groups=curve.groups, series=name)
        steps.update(step for spike in found for step in (spike.onset, spike.peak))
    return sorted(steps)
