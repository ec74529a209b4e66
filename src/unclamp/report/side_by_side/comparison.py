"""Runs side by side as plain data: what differs, where the losses part, what the sites lost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unclamp.errors import UnclampError
from unclamp.files import strict
from unclamp.report.arms import Band, final_loss
from unclamp.report.side_by_side.groups import Arm, find_arm, group_runs
from unclamp.report.side_by_side.kinds import KindDifference, kind_differences, kinds_in_words
from unclamp.report.side_by_side.limits import limits_in_words
from unclamp.report.side_by_side.losses import LossDifference, loss_band, loss_difference
from unclamp.report.side_by_side.pairing import pair_runs
from unclamp.report.side_by_side.reading import Side, read_sides
from unclamp.report.side_by_side.settings import Setting, differing_settings
from unclamp.report.side_by_side.sites import SiteRowOfArms, compare_sites
from unclamp.report.side_by_side.verdict import verdict_in_words
from unclamp.totals import SiteTotals


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the table of runs.

    Attributes:
        seed: As the metadata give it; None where they do not.
        losses: Steps that recorded one, count.
        first: The first of them; None without any.
        last: The last one.
        final_loss: Mean over its own last tenth of steps; None unless it is finished. Runs of
            different lengths end elsewhere, so arms are compared by `LossDifference`.
        nonfinite: Steps at which the loss is NaN or Inf.
        spikes: Onsets of the loss's spikes.
        saturated: Finite elements clamped; None where they were not counted.
        clamped_casts: Recorded casts in which anything was clamped.
        casts: Recorded casts of which it is known whether they clamped.
    """

    name: str
    path: str
    arm: str
    seed: Any
    status: str
    losses: int
    first: int | None
    last: int | None
    final_loss: float | None
    nonfinite: list[int]
    spikes: list[int]
    saturated: int | None
    clamped_casts: int
    casts: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Recorded runs side by side.

    Attributes:
        verdict: What the figures say, the most important first.
        limits: What they cannot say, and how pairs were found.
        baseline: The arm that the others are compared with.
        arms: Names of each arm's runs.
        differences: Of each other arm's loss from the baseline's.
        kinds: The same by kind of batch; empty without groups.
        settings: In which the arms differ; what is equal is not listed.
        sites: Largest difference of clamp error first.
        curves: Loss by arm; of a single arm, by run.
        spikes: Onsets of loss spikes, by curve.
        nonfinite: Steps at which a loss is NaN or Inf, by curve.
    """

    verdict: list[str]
    limits: list[str]
    baseline: str
    arms: dict[str, list[str]]
    runs: list[RunRow]
    differences: list[LossDifference]
    kinds: list[KindDifference]
    settings: list[Setting]
    sites: list[SiteRowOfArms]
    curves: dict[str, Band]
    spikes: dict[str, list[int]]
    nonfinite: dict[str, list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data; NaN and Inf are None."""
        return strict(asdict(self))


def compare_runs(
    paths: Sequence[Path],
    *,
    baseline: str | None = None,
    paired: bool | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Read recorded runs and compare them.

    Args:
        paths: Their folders, at least two.
        baseline: Name of an arm, or of a run in it, that the others are compared with; the first
            without it.
        paired: The user's word on whether runs saw the same batches; None to look.
        notes: What a reader must know before, such as runs that were left out.

    Raises:
        RunLogError: Fewer than two of the runs can be read.
        UnclampError: No arm and no run is called like the baseline.
    """
    sides, lost = read_sides(paths)
    arms = group_runs(sides)
    base = arms[0] if baseline is None else find_arm(arms, baseline)
    if base is None:
        known = ", ".join(repr(arm.name) for arm in arms)
        raise UnclampError(f"no arm and no run is called {baseline!r}; the arms are {known}")
    arms = [base, *(arm for arm in arms if arm is not base)]
    others = arms[1:]
    pairings = [pair_runs(arm, base, paired=paired) for arm in others]
    differences = [loss_difference(a, base, p) for a, p in zip(others, pairings, strict=True)]
    kinds = [k for a, p in zip(others, pairings, strict=True) for k in kind_differences(a, base, p)]
    settings, sites = differing_settings(arms), compare_sites(arms)
    lines = arms if others else [Arm(name=run.name, runs=(run,)) for run in base.runs]
    return Comparison(
        verdict=[*verdict_in_words(arms, differences, settings, sites), *kinds_in_words(kinds)],
        limits=[*notes, *lost, *limits_in_words(arms, differences, settings, sites)],
        baseline=base.name,
        arms={arm.name: [run.name for run in arm.runs] for arm in arms},
        runs=[_run_row(run, arm.name) for arm in arms for run in arm.runs],
        differences=differences,
        kinds=kinds,
        settings=settings,
        sites=sites,
        curves={line.name: loss_band(line.runs) for line in lines},
        spikes={line.name: _at(line.runs, _spikes) for line in lines},
        nonfinite={line.name: _at(line.runs, _nonfinite) for line in lines},
    )


def _at(runs: Sequence[Side], steps_of: Any) -> list[int]:
    return sorted({step for run in runs for step in steps_of(run)})


def _spikes(run: Side) -> list[int]:
    return run.record.loss_spikes


def _nonfinite(run: Side) -> list[int]:
    return [step for step, loss in run.losses.items() if not math.isfinite(loss)]


def _run_row(run: Side, arm: str) -> RunRow:
    total = sum((site.totals for site in run.record.sites), SiteTotals())
    return RunRow(
        name=run.name,
        path=str(run.path),
        arm=arm,
        seed=run.seed,
        status=run.record.status,
        losses=len(run.losses),
        first=min(run.losses, default=None),
        last=max(run.losses, default=None),
        final_loss=final_loss(run.record),
        nonfinite=_nonfinite(run),
        spikes=_spikes(run),
        saturated=total.saturated if total.is_counted else None,
        clamped_casts=total.clamped_rows,
        casts=total.decided_rows,
    )
