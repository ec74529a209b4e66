"""A spike explained beside the training that had it, which waits: in a second one of its own."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unclamp.analysis.explanation import Explanation
from unclamp.errors import UnclampError, UnclampWarning
from unclamp.explain.limits import Limits
from unclamp.explain.rewind import mends
from unclamp.explain.ring import Ring
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Build, Step, as_training, keeping_random_state
from unclamp.explain.watch import SpikeWatch, about_kind
from unclamp.runlog import starting_no_run

FURTHEST = 4
"""While a training waits, replays are so many times as long as the shortest at most."""
EVENT_SITES = 8
"""Sites that an event names; RUN/explain-<onset>.json has all."""


class InPlace:
    """Explains spikes of a training while it waits.

    Args:
        build: Makes a training for the replays.
        step: Does a step.
        arguments: Of `build`.
        run: The run's folder.
        replays: Most replays of an explanation.
        rewinds: Most times that the training may go back.
        tell: Takes events: kind, step and data.
    """

    def __init__(
        self,
        build: Build,
        step: Step,
        arguments: Mapping[str, Any],
        *,
        run: Path,
        replays: int,
        rewinds: int,
        tell: Callable[..., None],
    ) -> None:
        self._build, self._step, self._arguments = build, step, arguments
        self._run, self._replays, self._rewinds_left = run, replays, rewinds
        self._tell = tell

    def explain(
        self, ring: Ring, watch: SpikeWatch, *, onset: int, start: int, now: int
    ) -> tuple[Explanation, Snapshot] | None:
        """Explain a spike; return why and from where to go back if that mends it, else None.

        Args:
            ring: Holds the states.
            watch: Has heard the losses.
            onset: The spike's first step.
            start: The state to ask from first.
            now: The last step that was heard of.

        Raises:
            KeyboardInterrupt: It was interrupted.
        """
        snapshot = ring.snapshot(start, last=now)
        furthest = now - FURTHEST * (now - start + 1)
        older = [ring.snapshot(step, last=now) for step in ring.older(start) if step >= furthest]
        try:
            found = self._investigate(watch, snapshot, older, onset)
        except UnclampError as error:
            # No reason to end a training.
            warnings.warn(f"the spike was not explained: {error}", UnclampWarning, stacklevel=5)
            self._tell("explain", onset, error=str(error))
            return None
        if found.status == "interrupted":
            raise KeyboardInterrupt
        self._tell(
            "explain",
            onset,
            verdict=found.verdict,
            first_step=found.first_step,
            clamping_share=found.clamping_share,
            replays=found.replays,
            sites=[site.to_dict() for site in found.sites[:EVENT_SITES]],
        )
        if found.override is None or not mends(found.override) or self._rewinds_left <= 0:
            return None
        self._rewinds_left -= 1
        began = next(one for one in (snapshot, *older) if one.step == found.snapshot_step)
        return found, began

    def _investigate(
        self, watch: SpikeWatch, snapshot: Snapshot, older: list[Snapshot], onset: int
    ) -> Explanation:
        # Its own import: most runs never need it.
        from unclamp.explain.investigate import investigate  # noqa: PLC0415

        with keeping_random_state():
            with starting_no_run("a training for replays is being built"):
                twin = as_training(self._build(**self._arguments))
            spike = watch.spike_at(onset)
            kin = watch.kin_of(spike)
            return investigate(
                twin,
                self._step,
                snapshot,
                spike=spike,
                level=watch.level_before(onset),
                spikes=watch.spikes,
                kin=kin,
                notes=about_kind(spike, kin),
                run=self._run,
                older=older,
                limits=Limits(replays=self._replays),
            )
