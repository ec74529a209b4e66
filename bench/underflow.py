"""Underflow after an outlier: is the smallest set named, and does the override do what it says?

The truth is training from the start, with every subset of the planted sites in blocks: the true set
is the smallest that removes 90 % of what all of them remove of the rise of the steps in which they
underflow. `python -m bench.explain --table underflow`.
"""

import itertools
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import unclamp
from truths.trainings import record
from truths.underflows import HISTORY, OUTLIER, UnderflowCase, trained
from unclamp.explain import Explanation, explain_spike
from unclamp.names import SiteName
from unclamp.recipe import Recipe

BLOCKS = unclamp.Dynamic(granularity=unclamp.PerBlock(1, 32))
LONG = unclamp.Delayed(history_len=HISTORY)
CASES = {
    "the outlier is not read": [
        UnderflowCase(seed=3001),
        UnderflowCase(seed=3002, decoys=4),
        UnderflowCase(seed=3003, size=1e9),
        UnderflowCase(seed=3004, scaling=unclamp.Delayed(history_len=5)),
    ],
    "the outlier is read, and clamping protects": [
        UnderflowCase(seed=3011, read=10.0),
        UnderflowCase(seed=3012, read=10.0, decoys=4),
        UnderflowCase(seed=3013, read=20.0),
    ],
    "two and three in parallel": [
        UnderflowCase(seed=3021, branches=2),
        UnderflowCase(seed=3022, branches=2, parts=(1.0, 0.6), decoys=2),
        UnderflowCase(seed=3023, branches=2, parts=(1.0, 0.1)),
        UnderflowCase(seed=3024, branches=3, decoys=2),
    ],
    "other cause: bad batches": [
        UnderflowCase(seed=3031 + n, other="bad batches", decoys=1 + n) for n in range(4)
    ],
}


def _rise(losses: Sequence[float], steps: Sequence[int]) -> float:
    return sum(losses[n] - losses[OUTLIER - 1] for n in steps)


def _truth(case: UnderflowCase, losses: Sequence[float], steps: Sequence[int]) -> set[SiteName]:
    whole = _rise(losses, steps)
    removed = {
        members: 1 - _rise(trained(case, dict.fromkeys(members, BLOCKS)), steps) / whole
        for size in range(len(case.culprits) + 1)
        for members in itertools.combinations(case.culprits, size)
    }
    target = 0.9 * min(1.0, removed[tuple(case.culprits)])
    enough = [members for members in removed if removed[members] >= target]
    return set(min(enough, key=lambda members: (len(members), -removed[members])))


def _kept(case: UnderflowCase, found: Explanation, losses: Sequence[float]) -> tuple[float, float]:
    """Return how far the override's promise is off, and the worst it does to another step."""
    assert found.override is not None
    assert found.override.removed is not None
    assert found.underflow is not None
    recipe = Recipe.from_toml(case.recipe.to_toml() + "\n" + found.override.toml)
    training = case.build(recipe)
    anew = [case.step(training, batch).item() for batch in case.batches()]
    steps = list(found.underflow.by_step)
    removed = 1 - _rise(anew, steps) / _rise(losses, steps)
    others = (anew[n] - losses[n] for n in range(OUTLIER, len(losses)) if n not in steps)
    return abs(found.override.removed - removed), max(others)


def underflow() -> None:
    """Print a line a case, and the table of docs/explain.md."""
    rows: list[str] = []
    for kind, members in CASES.items():
        right, replays, off, worst = 0, [], [0.0], [0.0]
        for case in members:
            with tempfile.TemporaryDirectory() as scratch:
                run = Path(scratch) / "run"
                losses = record(case, run, every=4, keep=6, after=8)
                found = explain_spike(run, build=partial(case.build), step=case.step)
            steps = [n for n in case.harmed if n <= found.last and losses[n] > 2 * found.level]
            truth = set() if case.other else _truth(case, losses, steps)
            wanted = "not clamping" if case.other else "underflow"
            is_right = found.verdict == wanted and set(found.named) == truth
            right += is_right
            replays.append(found.replays)
            if found.override is not None and found.underflow is not None:
                promise, harm = _kept(case, found, losses)
                off.append(promise)
                worst.append(harm)
            scaling = found.override.scaling if found.override else "-"
            print(
                f"{'ok  ' if is_right else 'MISS'} {kind}, seed {case.seed}: {found.stated}, "
                f"named {[*map(str, found.named)]}, truth {[*map(str, truth)]}, {scaling}, "
                f"promise off by {off[-1]:.3f}, worst other step {worst[-1]:+.3f}, "
                f"{found.replays} replays",
                flush=True,
            )
        rows.append(
            f"| {kind} | {len(members)} | {right} | {min(replays)} to {max(replays)} | "
            f"{max(off):.3f} | {max(worst):+.3f} |"
        )
    print("\n| planted | cases | right | replays | promise off by | worst other step |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
