"""How often is chaos taken for a cause, and how often does an interval hold? 200 replays each.

Trainings at the edge of stability with a bad batch, among decoys that clamp: whatever moves there
is noise. A *null replay* is one more placebo, or a decoy un-clamped. `families` asks how often some
of ten sites without effect would pass: one more placebo stands for each un-clamped alone, and what
a repetition of the replay with nothing clamped moves for each clamped alone.
`python -m bench.explain --table nulls`, or `families`.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from truths.chaos import ChaosCase
from truths.trainings import SPIKE, record
from unclamp.explain.game import Window
from unclamp.explain.noise import Noise, family_factor
from unclamp.explain.start import Start
from unclamp.explain.store import find_snapshots, read_facts, read_snapshot
from unclamp.explain.watch import level_before
from unclamp.policy import unclamped

RUNS = 20
EACH = 10
PLACEBOS = 19
FAMILIES = 18
FIRST_SEED = 1000
"""No case of the tests or of other tables has seeds from here on."""


def start_of(case: ChaosCase, run: Path) -> Start:
    """Train a case, and return a start at its spike, asked plain and with nothing clamped."""
    losses = record(case, run, every=4, keep=6, write="all")
    paths = {read_facts(path)["step"]: path for path in find_snapshots(run)}
    snapshot = read_snapshot(paths[max(n for n in paths if n <= SPIKE - 4)])
    level = level_before(list(range(len(losses))), losses, SPIKE)
    start = Start(
        case.build(),
        case.step,
        snapshot,
        window=Window(first=SPIKE, last=SPIKE, level=level),
        run=run,
        budget=10_000,
        on_replay=lambda: None,
    )
    start.plain()
    start.without_clamping()
    return start


def placebos_of(start: Start, count: int) -> list[float]:
    """Return what so many placebos move."""
    return [start.game.share_gone(start.game.placebo(seed)) for seed in range(count)]


def nulls_of(start: Start) -> tuple[list[float], list[float], list[float]]:
    """Return what 19 placebos move, then five more, then decoys that are un-clamped."""
    game = start.game
    moved = placebos_of(start, PLACEBOS + EACH)
    sites = [site for site in start.can_clamp if site in start.clamped()][:EACH]
    decoys = [game.removed("unclamped", [site]) for site in sites]
    return moved[:PLACEBOS], moved[PLACEBOS:], decoys


def repeated_of(start: Start) -> list[float]:
    """Return by how much the share that goes with nothing clamped differs when it is repeated."""
    game, replay = start.game, start.replay
    free = {site: unclamped(replay.original(site)) for site in start.can_clamp}
    changes = {site: scaling for site, scaling in free.items() if scaling is not None}
    gone = game.share_gone(start.free())
    return [
        game.share_gone(replay.run(changes, last=SPIKE, perturb=PLACEBOS + EACH + n)) - gone
        for n in range(EACH)
    ]


def nulls() -> None:
    """Print the tables of docs/explain.md."""
    rules = {
        "3 times the larger of 2 (as before)": lambda moved: 3 * Noise(moved=moved[:2]).largest,
        "3.43 times the larger of 2": lambda moved: Noise(moved=moved[:2]).limit,
        "1.61 times the largest of 5": lambda moved: Noise(moved=moved[:5]).limit,
        "the largest of 19": lambda moved: Noise(moved=moved).limit,
        "the larger of 2, as an interval (as before)": lambda moved: Noise(moved=moved[:2]).largest,
    }
    beyond = {name: [0, 0, 0] for name in rules}
    tried = [0, 0, 0]
    for harmless, harmful in _pairs():
        moved, more, decoys = nulls_of(harmless)
        tuple_moved = tuple(moved)
        own = placebos_of(harmful, PLACEBOS)
        again = repeated_of(harmful)
        for name, rule in rules.items():
            beyond[name][0] += sum(abs(x) > rule(tuple_moved) for x in more)
            beyond[name][1] += sum(abs(x) > rule(tuple_moved) for x in decoys)
            beyond[name][2] += sum(abs(x) > rule(tuple(own)) for x in again)
        for i, values in enumerate((more, decoys, again)):
            tried[i] += len(values)
        print(f"{tried[0]} of {RUNS * EACH}: {beyond}", flush=True)
    print(f"\nnull replays: {tried[0]} placebos, {tried[1]} un-clamped decoys; {tried[2]} repeats")
    print("\n| rule | placebos beyond | un-clamped decoys beyond | repeated shares held |")
    print("|---|---|---|---|")
    for name, (more, decoys, again) in beyond.items():
        print(
            f"| {name} | {more / tried[0]:.1%} | {decoys / tried[1]:.1%} | "
            f"{1 - again / tried[2]:.1%} |"
        )


def families() -> None:
    """Print the table of docs/explain.md on families of sites."""
    beyond = {count: [0, 0] for count in (2, 5, PLACEBOS)}
    tried = 0
    for start in itertools.chain.from_iterable(_pairs(FAMILIES // 2, apart=50)):
        moved = tuple(placebos_of(start, PLACEBOS + EACH))
        most = max(map(abs, (*moved[PLACEBOS:], *repeated_of(start))))
        tried += 1
        for count, passed in beyond.items():
            noise = Noise(moved=moved[:count])
            passed[0] += most > noise.limit
            passed[1] += most > family_factor(count, EACH) * noise.largest
        print(f"{tried} of {FAMILIES}: {beyond}", flush=True)
    print(f"\n{tried} trainings, {EACH} sites each, asked both ways")
    print("\n| placebos | some site passes, each judged for itself | judged together |")
    print("|---|---|---|")
    for count, (single, together) in beyond.items():
        print(f"| {count} | {single} of {tried} | {together} of {tried} |")


def _pairs(runs: int = RUNS, *, apart: int = RUNS) -> Iterator[tuple[Start, Start]]:
    for n in range(runs):
        seed = FIRST_SEED + n
        bad = ChaosCase(seed=seed, other="bad batch", paths=((0.0,), (0.0,)), decoys=3, amount=0.5)
        clamped = ChaosCase(seed=seed + apart, decoys=2, amount=0.5)
        with tempfile.TemporaryDirectory() as scratch:
            yield (
                start_of(bad, Path(scratch) / "bad"),
                start_of(clamped, Path(scratch) / "clamped"),
            )
