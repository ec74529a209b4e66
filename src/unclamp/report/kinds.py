"""Losses by kind of batch: of a run, and of an arm beside the baseline.

A kind is what the user called a group. Torch-free.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.analysis.groups import MOST_KINDS, Group, kind_in_words, largest_kinds
from unclamp.analysis.paired import PairedDifference, paired_difference
from unclamp.report.bands import by_step, mean
from unclamp.report.recorded import RunRecord
from unclamp.written import counted, listed, loss_text


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
        for group, places in largest_kinds(run.groups).items()
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
    """Say the mean loss of each kind of a run, and what clamping took from the rarer ones.

    How fast each fell is not said: kinds lie at different steps, and a fall is steep at first.
    """
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
    return [f"Mean loss by kind of batch: {listed(shown)}{rest}.", *_gradient_sentences(run, kinds)]


def _gradient_sentences(run: RunRecord, kinds: Iterable[Group]) -> list[str]:
    """Say of each rarer kind what clamping took from its gradients."""
    _, *others = list(kinds)[: MOST_KINDS + 1]
    found = [(group, run.kind_gradients.get(group)) for group in others]
    return [
        gradients.words(*_batches(group))
        for group, gradients in found
        if gradients is not None and gradients.has_clamped
    ]


def _batches(group: Group) -> tuple[str, str]:
    several = kind_in_words(group)
    return several.replace("batches", "batch", 1), several


def kinds_data(run: RunRecord) -> list[dict[str, Any]]:
    """Return the kinds of a run as plain data: group, batches and mean loss."""
    return [
        {"group": group, "batches": len(steps), "loss": _mean_at(run, steps)}
        for group, steps in kind_steps(run).items()
    ]
