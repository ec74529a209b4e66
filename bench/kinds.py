"""Spikes and links among batches of two kinds: false alarms, recall and false names, by command.

`python -m bench.kinds` prints the table of docs/spikes.md, "Kinds of batches", and
`python -m bench.kinds association` that of docs/association.md; about one and three minutes on one
core. Healthy curves are those of `bench.spikes`; one batch in twenty, at random, is an "answer",
whose loss is 1.75 times as high.
"""

import argparse

import numpy as np

from truths.curves import FAMILIES, HELD_OUT, healthy
from truths.kinds import CULPRIT, KindRun, kind_run
from unclamp.analysis import find_spikes
from unclamp.analysis.association import associate_series
from unclamp.analysis.groups import Group

CURVES = 6
RUNS = 10
"""Of each case; nothing was tuned on any."""
SHARE = 0.05
LEVEL = 1.75
HEIGHT = 1.6
FIRST = 700
"""Spikes are planted from this step on: by then some 35 answers came, of which 25 are judged by."""


def mixed(family: str, seed: int) -> tuple[np.ndarray, list[Group]]:
    """Return a healthy curve whose batches are of two kinds, and the kinds."""
    curve = healthy(family, seed)
    is_answer = np.random.default_rng([seed, 401]).random(len(curve)) < SHARE
    groups: list[Group] = ["answers" if answer else None for answer in is_answer]
    return curve * np.where(is_answer, LEVEL, 1.0), groups


def measure_spikes() -> None:
    """Print alarms and recall by family, with groups and without."""
    print(f"| family | alarms, no kinds | alarms, groups | alarms, none | {HEIGHT}x text, groups "
          "| none | answers, groups | none |")  # fmt: skip
    print("|---|" + "---:|" * 7)
    total = np.zeros(4)
    for family in FAMILIES:
        counts, steps = np.zeros(3), 0
        found = np.zeros((2, 2))
        for seed in range(HELD_OUT, HELD_OUT + CURVES):
            losses, groups = mixed(family, seed)
            counts += [
                len(find_spikes(healthy(family, seed))),
                len(find_spikes(losses, groups=groups)),
                len(find_spikes(losses)),
            ]
            steps += len(losses)
            found += _recall(losses, groups, seed)
        total += [*counts, steps]
        rates = " | ".join(f"{1e4 * count / steps:.2f}" for count in counts)
        shares = " | ".join(f"{share:.2f}" for share in (found / CURVES).ravel())
        print(f"| {family} | {rates} | {shares} |", flush=True)
    rates = " | ".join(f"{1e4 * count / total[3]:.2f}" for count in total[:3])
    print(f"| **all** | {rates} | | | | |\n\n{int(total[3]):,} steps")


def _recall(losses: np.ndarray, groups: list[Group], seed: int) -> np.ndarray:
    """Return, by kind, whether a planted spike is found with groups and without."""
    found = np.zeros((2, 2))
    for row, kind in enumerate((None, "answers")):
        own = [i for i, group in enumerate(groups) if group == kind and FIRST <= i < len(groups)]
        onset = int(np.random.default_rng([seed, 97]).choice(own))
        raised = losses.copy()
        raised[onset] *= HEIGHT
        for column, given in enumerate((groups, ())):
            spikes = find_spikes(raised, groups=given)
            found[row, column] = any(
                spike.onset <= onset <= spike.end and spike.group == (kind if given else None)
                for spike in spikes
            )
    return found


def measure_association() -> None:
    """Print how often anybody, and the culprit alone, is named, with groups and without."""
    print("| answers | loss where the culprit clamps | groups | anybody named | culprit alone |")
    print("|---|---:|---|---:|---:|")
    for regular in (False, True):
        for harm in (1.0, 1.1):
            for grouped in (True, False):
                runs = [kind_run(i, harm=harm, regular=regular) for i in range(RUNS)]
                named = [_named(run, grouped=grouped) for run in runs]
                anybody = sum(map(bool, named)) / RUNS
                alone = sum(each == [CULPRIT] for each in named) / RUNS
                where = "every 10th" if regular else "10 % at random"
                given = "yes" if grouped else "no"
                print(f"| {where} | {harm}x | {given} | {anybody:.2f} | {alone:.2f} |", flush=True)


def _named(run: KindRun, *, grouped: bool) -> list[int]:
    found = associate_series(
        run.clamping,
        run.loss,
        spikes=run.spikes(grouped=grouped),
        names=run.names,
        groups=run.groups if grouped else (),
    )
    return [site.site for site in found.sites if site.by]


TABLES = {"spikes": measure_spikes, "association": measure_association}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.kinds", description=__doc__)
    parser.add_argument("table", nargs="?", choices=list(TABLES), default="spikes")
    TABLES[parser.parse_args().table]()
