"""What a training's snapshots take on disk: the one before a spike, and older ones as far as fits.

Written by a thread, so that the training goes on. Which state is the one before a spike is for
`snapshots` to say, what is still in memory for `ring`.
"""

import time
from pathlib import Path

from unclamp.explain.ring import Ring
from unclamp.explain.snapshot import Snapshot
from unclamp.worker import Worker

_LOOK_S = 0.05


class Disk:
    """Puts snapshots into RUN/snapshots.

    Args:
        run: The run's folder.
        budget_bytes: Disk that older snapshots may take, less what the others took.

    Attributes:
        failures: How many could not be written so far.
    """

    def __init__(self, run: Path, *, budget_bytes: float) -> None:
        self._run, self._left = run, budget_bytes
        self._written: dict[int, int] = {}
        self._named: list[tuple[int, int]] = []
        self._writer = Worker(self._write, name="unclamp-snapshots")
        self.failures = 0

    def put(self, ring: Ring, start: int, *, last: int) -> Snapshot:
        """Have a snapshot written, however much is left; return it."""
        snapshot = ring.snapshot(start, last=last)
        self._writer.put(snapshot)
        self._written[start] = snapshot.last_step
        self._named.append((start, snapshot.last_step))
        self._left -= ring.size_of(start, last=last)
        return snapshot

    def put_older(self, ring: Ring, start: int) -> dict[str, list[int]]:
        """Write the states from before `start` too; return which, and which the disk is not for.

        Each with the batches up to the next one only, as `chain` joins them.
        """
        older: list[int] = []
        left_out: list[int] = []
        following = start
        for step in ring.older(start):
            if self._written.get(step, -1) < following - 1:
                if left_out or ring.size_of(step, last=following - 1) > self._left:
                    left_out.append(step)
                    continue
                self.put(ring, step, last=following - 1)
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

    def incomplete(self, *, patience_s: float) -> list[int]:
        """Return the steps of snapshots that another rank has not written, after a wait for them.

        Nobody meets for this: the other may be gone.
        """
        from unclamp.explain.parts import is_whole  # noqa: PLC0415

        deadline, left = time.monotonic() + patience_s, list(self._named)
        while left:
            left = [name for name in left if not is_whole(self._run, *name)]
            if left and time.monotonic() > deadline:
                break
            if left:
                time.sleep(_LOOK_S)
        return [step for step, _ in left]

    def _write(self, snapshot: Snapshot) -> None:
        # Its own import: torch.distributed.checkpoint takes a second, and most runs need it late.
        from unclamp.explain.store import write_snapshot  # noqa: PLC0415

        try:
            write_snapshot(self._run, snapshot)
        except BaseException:
            self.failures += 1
            raise
