"""Losses by kind of batch: of a run, of an arm beside the baseline, and how fast each fell.

A kind is what the user called a group. Torch-free.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.analysis.falls import Pace, compare_falls, pace_in_words
from unclamp.analysis.groups import Group, kind_in_words, split_places
from unclamp.analysis.paired import PairedDifference, paired_difference
from unclamp.report.bands import by_step, mean
from unclamp.report.recorded import RunRecord
from unclamp.written import counted, listed, loss_text

MOST_KINDS = 4
"""Kinds that a sentence tells of, those with the most batches; tables and JSON have all."""
NO_PROOF = (
    "Kinds may differ in how fast they can be learnt, and what else they have in common is not "
    "told by a rate: that clamping is why, only a run without it shows."
)


@dataclass(frozen=True, kw_only=True)
class KindLoss:
    """The loss of an arm among batches of one kind.

    Attributes:
        group: The kind; None for batches without a group.
        batches: Steps of the kind with a loss, mean over seeds.
        loss: Mean over these steps, then over seeds; NaN where one is not finite.
        log_ratio: Logarithm of the loss over that of the baseline at the same steps, a mean a
            seed, as a paired difference over seeds; None for the baseline itself, without a seed
            that both have, and where marked steps are compared in place of kinds.
    """

    group: Group
    batches: float
    loss: float
    log_ratio: PairedDifference | None


def kind_steps(run: RunRecord) -> dict[Group, list[int]]:
    """Return the steps with a loss of each kind, most batches first; empty without groups."""
    if not run.groups:
        return {}
    of_kind = {
        group: steps
        for group, places in split_places(run.groups).items()
        if (steps := [run.steps[i] for i in places if run.loss[i] is not None])
    }
    return dict(sorted(of_kind.items(), key=lambda pair: -len(pair[1])))


def kind_losses(
    runs: Mapping[int, RunRecord], baseline: Mapping[int, RunRecord] | None
) -> list[KindLoss]:
    """Return the loss of an arm by kind, most batches first.

    Args:
        runs: Of the arm, by seed.
        baseline: Of the arm that it is compared with; None for no comparison.
    """
    steps = {seed: kind_steps(run) for seed, run in runs.items()}
    total: dict[Group, int] = {}
    for of_kind in steps.values():
        for group, own in of_kind.items():
            total[group] = total.get(group, 0) + len(own)
    return [
        KindLoss(
            group=group,
            batches=total[group] / len(runs),
            loss=mean(
                [_mean_at(runs[s], own[group]) for s, own in steps.items() if own.get(group)]
            ),
            log_ratio=None
            if baseline is None
            else log_ratio(runs, baseline, lambda run, group=group: kind_steps(run).get(group, [])),
        )
        for group in sorted(total, key=lambda group: -total[group])
    ]


def log_ratio(
    runs: Mapping[int, RunRecord],
    baseline: Mapping[int, RunRecord],
    steps_of: Callable[[RunRecord], Iterable[int]],
) -> PairedDifference | None:
    """Compare the logarithms of the losses at some steps, a mean a seed; None without any.

    Steps of one seed are not independent of each other, so a seed is one value.
    """
    own, other = [], []
    for seed, run in runs.items():
        pairs = pairs_at(run, baseline.get(seed), steps_of(run))
        if pairs:
            own.append(mean([_log(mine) for mine, _ in pairs]))
            other.append(mean([_log(theirs) for _, theirs in pairs]))
    return paired_difference(own, other) if own else None


def pairs_at(
    run: RunRecord, baseline: RunRecord | None, steps: Iterable[int]
) -> list[tuple[float, float]]:
    """Return the losses of both at those steps that both recorded."""
    if baseline is None:
        return []
    own, other = by_step(run), by_step(baseline)
    # A loss of 0 has no ratio to it.
    return [(own[s], other[s]) for s in steps if s in own and other.get(s)]


def _log(loss: float) -> float:
    """Return the logarithm of a loss; NaN of one that has none."""
    return math.log(loss) if 0 < loss < math.inf else math.nan


def _mean_at(run: RunRecord, steps: Sequence[int]) -> float:
    losses = by_step(run)
    return mean([losses[step] for step in steps])


# In words -----------------------------------------------------------------------------------------
def kind_sentences(run: RunRecord) -> list[str]:
    """Say the mean loss of each kind of a run, and how fast the rarer ones fell."""
    kinds = kind_steps(run)
    if not kinds:
        return []
    shown = [
        f"{loss_text(_mean_at(run, steps))} for {counted(len(steps), 'batch', 'batches')} "
        f"{kind_in_words(group).removeprefix('batches ')}"
        for group, steps in list(kinds.items())[:MOST_KINDS]
    ]
    more = len(kinds) - MOST_KINDS
    rest = f"; and {counted(more, 'more kind')}" if more > 0 else ""
    return [f"Mean loss by kind of batch: {listed(shown)}{rest}.", *_pace_sentences(run, kinds)]


def _pace_sentences(run: RunRecord, kinds: Mapping[Group, list[int]]) -> list[str]:
    """Say of each rarer kind what clamping took from its gradients, and how fast its loss fell.

    The pace is that of the most frequent kind, meanwhile.
    """
    usual, *others = list(kinds)[: MOST_KINDS + 1]
    said, apart = [], False
    for group in others:
        gradients = run.kind_gradients.get(group)
        if gradients is not None and gradients.has_clamped:
            said.append(gradients.words(*_batches(group)))
        pace = _pace_within(run, kinds[group], kinds[usual])
        if pace is not None:
            words = pace_in_words(pace, own=kind_in_words(group), other=kind_in_words(usual))
            said.append(f"{words[0].upper()}{words[1:]}.")
            apart = apart or pace.verdict in ("slower", "faster")
    return [*said, NO_PROOF] if apart else said


def _batches(group: Group) -> tuple[str, str]:
    several = kind_in_words(group)
    return several.replace("batches", "batch", 1), several


def _pace_within(run: RunRecord, own: list[int], usual: list[int]) -> Pace | None:
    losses = by_step(run)
    meanwhile = [step for step in usual if own[0] <= step <= own[-1]]
    return compare_falls(own, [losses[s] for s in own], meanwhile, [losses[s] for s in meanwhile])


def kinds_data(run: RunRecord) -> list[dict[str, Any]]:
    """Return the kinds of a run as plain data: group, batches, mean loss, and pace.

    `pace` is how fast the kind's loss fell over how fast that of the most frequent kind did;
    null for that kind, and where nothing can be told.
    """
    kinds = kind_steps(run)
    usual = next(iter(kinds.values()), [])
    rows = []
    for group, steps in kinds.items():
        pace = None if steps is usual else _pace_within(run, steps, usual)
        is_told = pace is not None and pace.interval is not None
        rows.append(
            {
                "group": group,
                "batches": len(steps),
                "loss": _mean_at(run, steps),
                "pace": pace.ratio if pace is not None and is_told else None,
                "pace_interval": pace.interval if pace is not None and is_told else None,
            }
        )
    return rows
