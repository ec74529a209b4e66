"""What a training's snapshots take on disk: the one before a spike, and older ones as far as fits.

Written by a thread, so that the training goes on. Which state is the one before a spike is for
`snapshots` to say, what is still in memory for `ring`.
"""

from functools import partial
from pathlib import Path

from unclamp.explain.ring import Ring
from unclamp.explain.snapshot import Snapshot
from unclamp.worker import Worker


class Disk:
    """Puts snapshots into RUN/snapshots.

    Args:
        run: The run's folder.
        budget_bytes: Disk that older snapshots may take, less what the others took.
    """

    def __init__(self, run: Path, *, budget_bytes: float) -> None:
        self._left = budget_bytes
        self._written: dict[int, int] = {}
        self._writer = Worker(partial(_write_below, run), name="unclamp-snapshots")

    def put(self, snapshot: Snapshot) -> None:
        """Have a snapshot written, however much is left."""
        self._writer.put(snapshot)
        self._written[snapshot.step] = snapshot.last_step
        self._left -= snapshot.size

    def put_older(self, ring: Ring, start: int) -> dict[str, list[int]]:
        """Write the states from before `start` too; return which, and which the disk is not for.

        Each with the batches up to the next one only, as `chain` joins them.
        """
        older: list[int] = []
        left_out: list[int] = []
        following = start
        for step in ring.older(start):
            if self._written.get(step, -1) < following - 1:
                snapshot = ring.snapshot(step, last=following - 1)
                if left_out or snapshot.size > self._left:
                    left_out.append(step)
                    continue
                self.put(snapshot)
            older.append(step)
            following = step
        return {"older": older, "left_out": left_out} if older or left_out else {}

    def forget(self) -> None:
        """Take nothing for written: the training went back, and its steps come again."""
        self._written.clear()

    def take_failure(self) -> BaseException | None:
        """Return why a snapshot could not be written, once."""
        return self._writer.take_failure()

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.close()


def _write_below(run: Path, snapshot: Snapshot) -> None:
    # Its own import: torch.distributed.checkpoint takes a second, and most runs need it late.
    from unclamp.explain.store import write_snapshot  # noqa: PLC0415

    write_snapshot(run, snapshot)
