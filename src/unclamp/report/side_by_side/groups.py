"""Which runs are seeds of one arm, and what an arm is called. Torch-free.

Runs with the same recipe and metadata but for `seed` are seeds of one arm, if their seeds differ.
Where the seeds repeat, where they ran is looked at too: the same seeds on two machines, or before
and after a commit, are two arms. What still repeats, or has no seed, is an arm of its own: two
runs that say nothing of how they differ were given to be compared, not to be averaged.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from unclamp.names import SiteName
from unclamp.report.side_by_side.reading import Side, canonical, short_names
from unclamp.totals import SiteTotals

SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seed alone, in the order in which they were given."""

    name: str
    runs: tuple[Side, ...]

    @property
    def sites(self) -> dict[SiteName, SiteTotals]:
        """What was lost at each site, added up over the runs."""
        totals: dict[SiteName, SiteTotals] = {}
        for site in (site for run in self.runs for site in run.record.sites):
            totals[site.name] = totals.get(site.name, SiteTotals()) + site.totals
        return totals


def group_runs(sides: Sequence[Side]) -> list[Arm]:
    """Return the arms of these runs, in the order of their first ones."""
    groups: list[list[Side]] = []
    for similar in _by(sides, _training):
        for group in [similar] if _are_seeds(similar) else _by(similar, _place):
            groups += [group] if _are_seeds(group) else [[side] for side in group]
    groups.sort(key=lambda group: sides.index(group[0]))
    names = _names(groups)
    return [Arm(name=name, runs=tuple(runs)) for name, runs in zip(names, groups, strict=True)]


def find_arm(arms: Sequence[Arm], name: str) -> Arm | None:
    """Return the arm of this name, or that of the run of this name or path; None without one."""
    for arm in arms:
        if name == arm.name:
            return arm
    for arm in arms:
        for run in arm.runs:
            if name in (run.name, str(run.path), str(run.path.resolve())):
                return arm
    return None


def _by(sides: Iterable[Side], key: Callable[[Side], str]) -> list[list[Side]]:
    groups: dict[str, list[Side]] = defaultdict(list)
    for side in sides:
        groups[key(side)].append(side)
    return list(groups.values())


def _training(side: Side) -> str:
    """Return what decides how a run trains, but for its seed, as far as its header knows."""
    header = side.header
    metadata = {key: value for key, value in header.metadata.items() if key != SEED}
    return canonical([header.recipe, metadata, header.observed, header.world_size])


def _place(side: Side) -> str:
    header = side.header
    return canonical([header.environment, header.git_commit, header.unclamp_version])


def _are_seeds(group: Sequence[Side]) -> bool:
    seeds = [canonical(side.seed) for side in group]
    return all(side.seed is not None for side in group) and len(set(seeds)) == len(seeds)


def _names(groups: Sequence[Sequence[Side]]) -> list[str]:
    """Return the arms' names: that of the run where it is alone, else the first way that works.

    It works if it gives each arm another name.
    """
    several = [group for group in groups if len(group) > 1]
    for way in (_given, _folders, _common):
        found = iter(way(several) or [""] * len(several))
        names = [group[0].name if len(group) == 1 else next(found) for group in groups]
        if all(names) and len(set(names)) == len(names):
            return names
    return [
        group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        for group in groups
    ]


def _given(groups: Sequence[Sequence[Side]]) -> list[str]:
    """Return what the metadata call the arms."""
    names = [group[0].header.metadata.get("arm") for group in groups]
    return [name if isinstance(name, str) else "" for name in names]


def _folders(groups: Sequence[Sequence[Side]]) -> list[str]:
    """Return the folders that hold the runs of an arm each; nothing where they hold others too."""
    folders = [{side.path.resolve().parent for side in group} for group in groups]
    distinct = {folder for each in folders for folder in each}
    if not len(distinct) == sum(map(len, folders)) == len(folders):
        return []
    return short_names([folder for each in folders for folder in each])


def _common(groups: Sequence[Sequence[Side]]) -> list[str]:
    """Return what the runs' names begin with: `delayed` of `delayed-0` and `delayed-1`."""
    starts = [_shared_start([side.name for side in group]).rstrip("-_./ =") for group in groups]
    return [start.removesuffix(SEED).rstrip("-_./ =") for start in starts]


def _shared_start(names: Sequence[str]) -> str:
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in shared)
