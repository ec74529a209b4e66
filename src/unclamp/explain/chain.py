"""Snapshots on disk that lead up to a later one: each has the batches up to the next, or beyond.

What is written at a spike is the state shortly before it with all batches, and older states with
the batches up to the next one: joined here, so that none is written twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from unclamp.explain.ranks import ALONE, Ranks
from unclamp.explain.replay import same_losses
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.store import read_facts, read_snapshot

_SAME = ("code", "arguments")


def earlier_snapshots(
    paths: Sequence[Path], latest: Snapshot, *, ranks: Ranks = ALONE
) -> Iterator[Snapshot]:
    """Yield those of snapshots from which a replay reaches the end of `latest`, newest first.

    Each is read when its turn comes, and yielded with all batches and losses from its step on.
    Left out are those whose steps are not followed by another one's, those of another build
    function, and those of steps that went another way: the run went back since.

    Raises:
        ReplayError: One is damaged.
    """
    batches, losses, reach = dict(latest.batches), dict(latest.losses), latest.step
    known = ranks.first(lambda: [(read_facts(path), path) for path in paths])
    for facts, path in sorted(known, key=lambda one: (-one[0]["step"], -one[0]["last_step"])):
        step = facts["step"]
        if step >= reach or facts["last_step"] + 1 < reach:
            continue
        if any(facts.get(name) != latest.facts.get(name) for name in _SAME):
            continue
        snapshot = ranks.together(lambda path=path: read_snapshot(path, rank=ranks.rank))
        if not ranks.every(same_losses(snapshot.losses, losses)):
            continue
        batches, losses = {**snapshot.batches, **batches}, {**snapshot.losses, **losses}
        reach = step
        yield replace(snapshot, batches=batches, losses=losses)
