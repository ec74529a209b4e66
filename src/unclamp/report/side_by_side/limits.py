"""What a comparison of runs cannot say, and how its pairs were found, in sentences. Torch-free."""

from collections.abc import Mapping, Sequence

from unclamp.analysis.paired import comparisons_in_words
from unclamp.names import shown
from unclamp.report.evidence import PAPER
from unclamp.report.side_by_side.groups import Arm
from unclamp.report.side_by_side.losses import LossDifference, comparisons_of
from unclamp.report.side_by_side.reading import Side, canonical
from unclamp.report.side_by_side.settings import Setting, changed_settings, varied_settings
from unclamp.report.side_by_side.sites import SiteRowOfArms
from unclamp.written import counted, listed

MOST_NAMES = 6
TOGETHER = 0.5
"""Rank correlation of two losses' changes below which a reader is told to look. Runs of a small
Llama on the same batches have 0.99 and more; on other batches it is that of their trends alone."""


def limits_in_words(
    arms: Sequence[Arm],
    differences: Sequence[LossDifference],
    settings: Sequence[Setting],
    sites: Sequence[SiteRowOfArms],
) -> list[str]:
    """Return the limits: of the runs, of the pairs, of causes and of the counts."""
    runs = [run for arm in arms for run in arm.runs]
    said = [f"{run.name}: {note}" for run in runs for note in run.notes]
    said += _how(differences)
    for found in differences:
        said += _apart(found)
        said += _coverage(found, arms)
        said += _causes(found, settings, {arm.name: arm for arm in arms})
    said += comparisons_in_words(comparisons_of(differences), arms[0].name)
    for arm in arms:
        said += _varied(arm)
    said += _counts(runs) + _missing_casts(runs) + _lone_sites(sites)
    if any(row.is_clamped for row in sites):
        said.append(f"Clamping can also do harm that the training loss does not show ({PAPER}).")
    return said


def _how(differences: Sequence[LossDifference]) -> list[str]:
    """Say how pairs were found; once, where it is the same for all."""
    ways: dict[str, list[str]] = {}
    for found in differences:
        ways.setdefault(found.how, []).append(found.arm)
    if len(ways) <= 1:
        return list(ways)
    return [f"{_some(names)} and {differences[0].baseline}: {how}" for how, names in ways.items()]


def _apart(found: LossDifference) -> list[str]:
    """Say that pairs do not look like runs on the same batches."""
    loose = [p for p in found.partings if p.together is not None and p.together < TOGETHER]
    return [
        f"The losses of {parting.own} and {parting.other} do not rise and fall together from step "
        f"to step, as they do on the same batches (rank correlation {parting.together:.2g}): look "
        "whether the batches were the same."
        for parting in loose[:MOST_NAMES]
    ]


def _coverage(found: LossDifference, arms: Sequence[Arm]) -> list[str]:
    """Say which steps are compared, where that is not all of all runs."""
    if found.first is None or found.last is None:
        return []
    named = {name for pair in found.pairs for name in pair}
    compared = [arm for arm in arms if arm.name in (found.arm, found.baseline)]
    runs = [run for arm in compared for run in arm.runs if not named or run.name in named]
    said = []
    ends = {run.name: max(run.losses) for run in runs}
    if max(ends.values()) > found.last:
        ends_in_words = _some([f"{name} to step {end:,}" for name, end in ends.items()])
        said.append(f"The losses go on for unequally long ({ends_in_words}): compared "
                    f"{_are(found.steps)} that all have, up to {found.last:,}.")  # fmt: skip
    inside = {
        run.name: sum(found.first <= step <= found.last for step in run.losses) for run in runs
    }
    starts = any(min(run.losses) < found.first for run in runs)
    if max(inside.values()) > found.steps or starts:
        said.append(
            f"{found.arm} and {found.baseline} recorded losses at different steps: compared "
            f"{_are(found.steps)} that {'is' if found.steps == 1 else 'are'} common."
        )
    return said


def _are(steps: int) -> str:
    """Return "is the step" of one, else "are the 12 steps"."""
    return "is the step" if steps == 1 else f"are the {counted(steps, 'step')}"


def _causes(
    found: LossDifference, settings: Sequence[Setting], arms: Mapping[str, Arm]
) -> list[str]:
    """Say that a difference has several possible causes, or that two arms may be seeds."""
    own, other = found.arm, found.baseline
    differ = [s for s in changed_settings(settings, own, other) if s.is_of_training]
    causes = dict.fromkeys(
        "the recipe" if s.where == "recipe" else f"{s.where} {s.name}" for s in differ
    )
    if len(causes) > 1:
        return [
            f"{own} and {other} differ in more than one thing ({_some(list(causes))}): which of "
            "them a difference comes from cannot be told."
        ]
    runs = (*arms[own].runs, *arms[other].runs)
    seeds = {canonical(run.seed) for run in runs if run.seed is not None}
    if len(seeds) == len(runs) and {s.where for s in differ} == {"metadata"}:
        return [
            f"{own} and {other} differ in their seeds and in {_some(list(causes))} alone: if "
            "that is but a label, they are seeds of one arm, and nothing is compared here."
        ]
    return []


def _varied(arm: Arm) -> list[str]:
    varied = varied_settings(arm)
    if not varied:
        return []
    names = _some([f"{setting.where} {setting.name}" for setting in varied])
    return [f"The runs of {arm.name} do not differ in the seed alone: {names}."]


def _counts(runs: Sequence[Side]) -> list[str]:
    """Say which steps the counts of sites are of."""
    said = []
    if any(run.record.recorded is not None for run in runs):
        parts = [
            f"{run.name} at each step"
            if run.record.recorded is None
            else f"{run.name} at {run.record.recorded:,} of "
            f"{counted(len(run.record.steps), 'step')}"
            for run in runs
        ]
        said.append(f"Counts of sites are of recorded casts only: {_some(parts)}.")
    elif len({canonical([len(run.record.steps)]) for run in runs if run.record.sites}) > 1:
        said.append("Counts of sites are of whole runs, which are not equally long.")
    worlds = {run.header.world_size for run in runs}
    if len(worlds) > 1:
        parts = [f"{run.name} {run.header.world_size}" for run in runs]
        said.append(
            f"The runs had different numbers of ranks ({_some(parts)}): a loss is the mean over "
            "ranks, a count the sum."
        )
    return said


def _missing_casts(runs: Sequence[Side]) -> list[str]:
    silent = [run for run in runs if not run.record.sites]
    plain = [run.name for run in silent if run.record.is_plain]
    odd = [run.name for run in silent if run.record.has_recipe]
    told = {*plain, *odd}
    unknown = [run.name for run in silent if run.name not in told]
    said = [f"{_some(plain)}: without FP8, by design."] if plain else []
    if unknown:
        said.append(
            f"{_some(unknown)}: no cast and no recipe is in the log; whether FP8 was used is not "
            "in it either."
        )
    if odd:
        said.append(
            f"{_some(odd)}: no FP8, although there is a recipe: no cast was recorded, so the "
            "loss says nothing of that recipe."
        )
    return said


def _lone_sites(sites: Sequence[SiteRowOfArms]) -> list[str]:
    """Say which sites not all arms have, of those that cast at all."""
    casting = list(sites[0].arms) if sites else []
    missing: dict[tuple[str, ...], list[str]] = {}
    for row in sites:
        there = tuple(name for name in casting if row.arms[name] is not None)
        if len(there) < len(casting):
            missing.setdefault(there, []).append(f"{shown(row.fqn)} {row.role}")
    return [
        f"{counted(len(names), 'site is', 'sites are')} only in "
        f"{_some(list(there))} ({listed(names, most=3)}): another "
        "model, or left out by a recipe."
        for there, names in missing.items()
    ]


def _some(names: Sequence[str]) -> str:
    return listed(names, most=MOST_NAMES)
