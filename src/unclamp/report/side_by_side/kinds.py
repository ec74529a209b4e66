"""How the losses of two arms differ by kind of batch, and how fast each kind's loss fell.

A kind is what the user called a group; a step counts where all runs that are compared give it the
same one. Torch-free.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.falls import Pace, compare_falls, pace_in_words
from unclamp.analysis.groups import Group, kind_in_words
from unclamp.analysis.paired import PairedDifference, paired_difference
from unclamp.analysis.unpaired import UnpairedDifference, unpaired_difference
from unclamp.report.bands import mean
from unclamp.report.kinds import kind_steps
from unclamp.report.side_by_side.groups import Arm
from unclamp.report.side_by_side.pairing import Pairing
from unclamp.report.side_by_side.reading import Side
from unclamp.written import counted


@dataclass(frozen=True, kw_only=True)
class KindDifference:
    """An arm's loss against the baseline's among batches of one kind.

    Attributes:
        group: The kind; None for batches without a group.
        batches: Steps at which all runs that are compared have a batch of it, count.
        own_loss: Mean over them and the arm's runs; NaN where one is not finite.
        other_loss: The same of the baseline.
        paired: Logarithm of own over other, a mean a pair of runs; None without pairs.
        unpaired: The same of groups of runs without pairs; None with pairs.
        pace: How fast the arm's loss fell compared with the baseline's, of the geometric means
            over runs; None for fewer than 20 batches, or where a loss is not above 0 and finite.
    """

    arm: str
    baseline: str
    group: Group
    batches: int
    own_loss: float
    other_loss: float
    paired: PairedDifference | None
    unpaired: UnpairedDifference | None
    pace: Pace | None


def kind_differences(own: Arm, other: Arm, pairing: Pairing) -> list[KindDifference]:
    """Compare the losses of two arms by kind of batch, most batches first; none without groups."""
    mine = [a for a, _ in pairing.pairs] or list(own.runs)
    theirs = [b for _, b in pairing.pairs] or list(other.runs)
    found = []
    for group, steps in _common_kinds([*mine, *theirs]).items():
        logs = [[_mean_log(run, steps) for run in runs] for runs in (mine, theirs)]
        losses = [mean([_mean(run, steps) for run in runs]) for runs in (mine, theirs)]
        found.append(
            KindDifference(
                arm=own.name,
                baseline=other.name,
                group=group,
                batches=len(steps),
                own_loss=losses[0],
                other_loss=losses[1],
                paired=paired_difference(*logs) if pairing.pairs else None,
                unpaired=None if pairing.pairs else unpaired_difference(*logs),
                pace=compare_falls(steps, _curve(mine, steps), _curve(theirs, steps)),
            )
        )
    return found


def kinds_in_words(found: Sequence[KindDifference]) -> list[str]:
    """Say of which kinds an arm's loss fell slower or faster than the baseline's.

    Of several comparisons of pace each has its own interval of 95 %, and how many there were is
    said: one in twenty leaves out 1 by chance.
    """
    paced = [kind for kind in found if kind.pace is not None and kind.pace.interval is not None]
    said = []
    for kind in paced:
        assert kind.pace is not None
        if kind.pace.verdict in ("slower", "faster"):
            own = f"{kind_in_words(kind.group)} in {kind.arm}"
            words = pace_in_words(kind.pace, own=own, other=f"the same in {kind.baseline}")
            said.append(f"{words[0].upper()}{words[1:]}.")
    if said:
        out = f"{len(said)} {'leaves' if len(said) == 1 else 'leave'} out 1"
        said.append(
            f"Of {counted(len(paced), 'comparison')} of how fast a loss fell, {out}, as one in 20 "
            "does by chance. Such an interval is over the batches of these runs: another seed may "
            "differ by more."
        )
    return said


def _common_kinds(runs: Sequence[Side]) -> Mapping[Group, list[int]]:
    """Return the steps of each kind that all runs have; empty where one has no groups."""
    first, *others = [kind_steps(run.record) for run in runs]
    common = {
        group: sorted(set(steps).intersection(*(kinds.get(group, ()) for kinds in others)))
        for group, steps in first.items()
    }
    return {group: steps for group, steps in common.items() if steps}


def _mean(run: Side, steps: Sequence[int]) -> float:
    return mean([run.losses[step] for step in steps])


def _mean_log(run: Side, steps: Sequence[int]) -> float:
    return mean([_log(run.losses[step]) for step in steps])


def _curve(runs: Sequence[Side], steps: Sequence[int]) -> list[float]:
    """Return the geometric mean over the runs at each step."""
    logs = np.array([[_log(run.losses[step]) for step in steps] for run in runs])
    return np.exp(logs.mean(axis=0)).tolist()


def _log(loss: float) -> float:
    """Return the logarithm of a loss; NaN of one that has none."""
    return math.log(loss) if 0 < loss < math.inf else math.nan
