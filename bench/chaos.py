"""At the edge of stability, where one bit moves the loss: is clamping blamed where it did nothing?

Fifteen cases of `truths.chaos`, planted both ways. The truth is training from the start, over and
over with weights changed by a hair, as the run was and with nothing clamped: clamping is the cause
if the loss at the spike falls below every one of the former in the median of the latter, and by
half of the rise at least. `python -m bench.explain --table chaos`.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

from truths.chaos import ChaosCase, losses_of_many
from truths.trainings import record
from unclamp.analysis.explanation import MOST
from unclamp.explain import Limits, explain_spike

REPEATS = 8
CASES = {
    "clamping": [
        ChaosCase(seed=2001),
        ChaosCase(seed=2002, amount=0.3),
        ChaosCase(seed=2003, amount=0.5, decoys=3),
        ChaosCase(seed=2004, amount=0.5, paths=((1.0,), (1.0,))),
        ChaosCase(seed=2005, amount=0.3, paths=((1.0, 1.0),)),
        ChaosCase(seed=2006, amount=0.5, size=96.0, paths=((1.0, 1.0),)),
        ChaosCase(seed=2009, amount=0.7, size=128.0, decoys=3),
    ],
    "bad batch": [
        ChaosCase(seed=2011 + n, amount=amount, other="bad batch", paths=((0.0,), (0.0,)), decoys=3)
        for n, amount in enumerate((0.1, 0.3, 0.5, 1.0))
    ],
    "chance": [
        # Of some hundred seeds those in which the loss jumps by chance soon after the outlier.
        ChaosCase(seed=488, paths=((0.0,),), decoys=2, jump=40.0),
        ChaosCase(seed=577, paths=((0.0,),), decoys=2, jump=40.0),
        ChaosCase(seed=598, paths=((0.0,),), decoys=2, jump=40.0),
        ChaosCase(seed=436, paths=((0.0,),), decoys=2, jump=40.0, outlier=28),
    ],
}


def share_by_training(case: ChaosCase, onset: int, level: float) -> tuple[float, bool]:
    """Return the share of the median rise that goes with nothing clamped, and if it is clear."""
    run = [losses[onset] for losses in losses_of_many(case, free=False, repeats=REPEATS)]
    free = [losses[onset] for losses in losses_of_many(case, free=True, repeats=REPEATS)]
    rise = statistics.median(run) - min(level, statistics.median(free))
    fall = statistics.median(run) - statistics.median(free)
    share = fall / rise if rise > 0.2 * level else 0.0
    return share, share >= MOST and statistics.median(free) < min(run)


def chaos() -> None:
    """Print a line a case, and the table of docs/explain.md."""
    print("| planted | cases | right | cannot tell | wrong | replays |")
    rows: list[str] = []
    for kind, members in CASES.items():
        right = refused = wrong = 0
        replays: list[int] = []
        for case in members:
            with tempfile.TemporaryDirectory() as scratch:
                run = Path(scratch) / "run"
                record(case, run, every=4, keep=6)
                found = explain_spike(
                    run, build=partial(case.build), step=case.step, limits=Limits()
                )
            share, is_clamping = share_by_training(case, found.onset, found.level)
            blamed = found.verdict in ("clamping", "mostly clamping", "partly clamping")
            is_right = blamed == is_clamping and (
                not is_clamping or set(found.named) == set(case.culprits)
            )
            is_refused = found.verdict == "cannot tell"
            right += is_right and not is_refused
            refused += is_refused
            wrong += not is_right and not is_refused
            replays.append(found.replays)
            print(
                f"{kind}, seed {case.seed}: onset {found.onset}, height {found.height:.2f}, "
                f"{found.verdict} {found.clamping_share or 0:.2f}, noise {found.noise or 0:.2f} of "
                f"{found.placebos}, named {[*map(str, found.named)]}; by training {share:.2f}, "
                f"clamping {is_clamping}; {found.replays} replays",
                flush=True,
            )
        rows.append(
            f"| {kind} | {len(members)} | {right} | {refused} | {wrong} | "
            f"{min(replays, default=0)} to {max(replays, default=0)} |"
        )
    print("\n| planted | cases | right | cannot tell | wrong | replays |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
