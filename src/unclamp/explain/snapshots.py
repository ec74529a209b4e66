"""In a training loop: states taken before steps, and kept on disk when the loss spikes.

    with Recorder(model, path) as recorder, Snapshots(training, path, build=build, step=step,
                                                      recorder=recorder) as snapshots:
        for n, batch in snapshots.follow(loader):
            loss = step(training, batch)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)

`follow` calls `before(n, batch)`, which a loop of another shape calls itself. A ring of states
lies in memory. When a spike is seen, the loop goes on for a few steps; then the state from before
the spike is written by a thread, with the batches of all steps since, and older ones at growing
distances, since what clamped long before may be the cause. With on_spike="explain" the
spike is explained on the spot, and the training goes on from before it, mended.

On several ranks each calls all of this. Each keeps its own state and batches and writes its part;
when that is, all decide alike, by the mean of their losses (`shared_loss`).
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from unclamp.errors import ReplayError, UnclampWarning, naming_arguments
from unclamp.explain.asked import Asked
from unclamp.explain.disk import Disk
from unclamp.explain.events import Events, group_of, numbered
from unclamp.explain.facts import code_facts, model_facts
from unclamp.explain.in_place import InPlace
from unclamp.explain.launched import check_several, own_part
from unclamp.explain.limits import check_choice
from unclamp.explain.mend import switch_sites
from unclamp.explain.ranks import all_ranks, are_several
from unclamp.explain.rewind import Rewind
from unclamp.explain.ring import GIB, Ring
from unclamp.explain.script import is_lost
from unclamp.explain.shared_loss import SharedLoss
from unclamp.explain.training import Batch, Build, Step, Training, put_state
from unclamp.explain.watch import LateLoss, SpikeWatch
from unclamp.files import strict
from unclamp.telemetry.group import Name, group_name

PATIENCE_S = 10.0
"""How long a rank that closes waits for the others' parts of snapshots, to tell whether they are
whole."""


class Snapshots:
    """Takes snapshots of a training, and keeps those around spikes.

    Args:
        training: The objects whose state is taken.
        path: The run's folder; snapshots go to RUN/snapshots. Give it to a Recorder too; "{n}" in
            it stands for the number that the recorder chose.
        build: Makes the training anew for a replay. A function of a module, or of the top level
            of the script that runs, can be found again by `unclamp explain`; any other has to be
            given to `explain_spike`.
        step: Does one step on a batch, and returns its loss.
        arguments: Keyword arguments of `build`, JSON data.
        every: Steps between snapshots.
        keep: Snapshots in memory: the two newest, and older ones each about twice as far back as
            the next, so that n of them reach `2 ** (n - 2) * every` steps back or more.
        budget_gib: Memory that they and the batches of all steps since the oldest may take; where
            it does not suffice, the oldest is dropped; not one that is still to be written, beside
            which none is taken that does not fit.
        disk_gib: Disk that a run's older snapshots may take: with the one shortly before a spike
            those from further back are written, as far as this allows. The first counts towards it
            too, but is written in any case.
        lead: Least steps from snapshot to spike, where the ring has one so old: what clamps
            shortly before a spike can cause it.
        after: Steps after a spike's onset whose batches are kept with it.
        write: "spikes" writes what lies before a spike, "all" every snapshot, with the batches of
            the `every + after` steps that follow it.
        on_spike: "keep" writes; "explain" also explains, and where clamping is the cause, goes
            back to before the spike with the recommended scaling. It makes a second training with
            `build`, beside the one that runs.
        replays: Most replays of an explanation on the spot.
        max_rewinds: Most times that a run goes back.
        recorder: Gets the events spike, snapshot, explain and rewind.

    Raises:
        ReplayError: A number is out of range, or "explain" without build and step, or on several
            ranks; or not all ranks make these within a minute, or their states cannot be taken.
    """

    @naming_arguments
    def __init__(
        self,
        training: Training,
        path: str | Path,
        *,
        build: Build | None = None,
        step: Step | None = None,
        arguments: Mapping[str, Any] | None = None,
        every: int = 10,
        keep: int = 6,
        budget_gib: float = 4.0,
        disk_gib: float = 16.0,
        lead: int = 4,
        after: int = 8,
        write: Literal["spikes", "all"] = "spikes",
        on_spike: Literal["keep", "explain"] = "keep",
        replays: int = 40,
        max_rewinds: int = 3,
        recorder: Events | None = None,
    ) -> None:
        check_choice("write", write, ("spikes", "all"))
        check_choice("on_spike", on_spike, ("keep", "explain"))
        for name, value, low in (("every", every, 1), ("keep", keep, 1), ("after", after, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ReplayError(f"expected a whole number {name} of {low} or more, got {value!r}")
        if on_spike == "explain" and (build is None or step is None):
            raise ReplayError(
                'on_spike="explain" needs the build and step functions to replay with'
            )
        if are_several():
            check_several(training.model, explains=on_spike == "explain")
        if on_spike != "explain" and is_lost(build, step):
            warnings.warn(
                "build and step come from standard input or python -c, where `unclamp explain` "
                "cannot find them later: put them into a file, or call "
                "unclamp.explain_spike(RUN, build=..., step=...) in this process",
                UnclampWarning,
                stacklevel=3,
            )
        self._training, self._path = training, numbered(path, recorder)
        self._arguments = dict(arguments or {})
        self._ranks = all_ranks()
        self._code = code_facts(build=build, step=step, arguments=self._arguments)
        self._code |= own_part(self._ranks).to_facts()
        self._every, self._lead, self._after = every, lead, after
        self._write_all = write == "all"
        self._recorder = recorder
        self._in_place: InPlace | None = None
        if on_spike == "explain":
            assert build is not None
            assert step is not None
            self._in_place = InPlace(
                build,
                step,
                self._arguments,
                run=self._path,
                replays=replays,
                rewinds=max_rewinds,
                tell=self._tell,
            )
        self._ring = Ring(keep=keep, budget_bytes=budget_gib * GIB, ranks=self._ranks)
        self._disk = Disk(self._path, budget_bytes=disk_gib * GIB)
        self._has_warned = self._is_absence_told = False
        self._watch = SpikeWatch()
        self._late = SharedLoss(self._ranks) if self._ranks.are_several else LateLoss()
        self._spike: int | None = None
        self._start: int | None = None
        self._asked = Asked()
        self._due: deque[int] = deque()
        self._is_due = False
        self._again: dict[int, Batch] = {}
        self._open: int | None = None
        self._last = -1
        self._next = 0
        self._is_closed = False

    @property
    def path(self) -> Path:
        """The run's folder, with its number."""
        return self._path

    # ---- in the loop -----------------------------------------------------------------------

    def follow(self, batches: Iterable[Any], *, first: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield step and batch, steps from `first` on; after a rewind the same ones again.

        Raises:
            ReplayError: `after` was not called for the step before, or as `before`.
        """
        source = iter(batches)
        self._next = first
        while True:
            step = self._next
            if step in self._again:
                batch = self._again.pop(step).fresh()
            else:
                try:
                    batch = next(source)
                except StopIteration:
                    return
            self.before(step, batch)
            yield step, batch
            if self._open is not None:
                raise ReplayError(
                    f"call snapshots.after({self._open}, loss) at the end of the step"
                )

    def before(self, step: int, batch: Any) -> None:
        """Take a snapshot if one is due, and keep the batch. Call it before the step.

        Raises:
            ReplayError: The snapshot does not fit the budget, or the state or the batch holds
                what cannot be kept.
        """
        self._hold()
        self._is_due |= step % self._every == 0 or not self._ring.steps
        if self._is_due and self._ring.has_room():
            facts = {**self._code, **model_facts(self._training.model)}
            self._is_due = not self._ring.take(step, self._training, facts)
            if self._write_all and not self._is_due:
                self._due.append(step)
                self._hold()
        self._ring.add_batch(step, batch)
        self._asked.begin(step, self._ring, lead=self._lead)
        self._open = step

    def after(self, step: int, loss: Tensor | float, *, group: Name = None) -> Rewind | None:
        """Hear the loss of a step; write or explain if a spike is complete.

        A loss on a GPU is looked at one step later, so that nothing waits for it.

        Args:
            step: Its number.
            loss: Its loss.
            group: The kind of its batch; by default what `recorder.step` was just given.

        Returns:
            Where the training is now if it went back; else None. `follow` does the rest.

        Raises:
            ReplayError: `before` was not called, or the loss is no number.
            RunLogError: The group is no name.
        """
        if self._open != step:
            raise ReplayError(f"call snapshots.before({step}, batch) at the start of the step")
        self._open, self._next, kind = None, step + 1, group_name(group)
        self._tell_failure()
        kind = group_of(self._recorder, step) if kind is None else kind
        self._watch.name(step, kind)
        if isinstance(self._late, SharedLoss):
            self._late.say(kind=kind, failures=self._disk.failures)
        for number, value in self._late.put(step, loss):
            rewind = self._hear(number, value)
            if rewind is not None:
                return rewind
        return None

    def keep(self, step: int | None = None) -> None:
        """Keep what is needed to ask about a step, a spike or not: `unclamp explain RUN --at N`.

        The state some steps before it is written, with the batches up to `after` steps behind it,
        and older states as for a spike.

        Args:
            step: A step to come, or one whose state is still in memory; without it the one that
                was heard of last.

        Raises:
            ReplayError: No state from before it is left, it is no step, or they are closed.
        """
        if self._is_closed:
            raise ReplayError("these snapshots are closed: call keep within the with block")
        step = self._asked.checked(max(self._last, 0) if step is None else step)
        if step < self._next and self._ring.before(step, lead=0) is None:
            held = self._ring.steps
            raise ReplayError(
                f"no state from before step {step} is left; the oldest is of step "
                f"{held[0] if held else 'none'}: call keep earlier, or raise keep or every"
            )
        self._asked.add(step)
        self._asked.begin(self._next - 1, self._ring, lead=self._lead)

    def close(self) -> None:
        """Write what is due and wait for the disk. Later calls do nothing."""
        if self._is_closed:
            return
        for number, value in self._late.rest():
            self._note(number, value)
        if self._spike is not None:
            self._write(self._ring.before(self._spike, lead=self._lead), self._spike)
            self._spike = None
        self._write_asked(self._last)
        while self._due:
            self._write(self._due.popleft(), None)
        self._disk.close()
        self._is_closed = True  # not before: after a Ctrl-C in here it may be called again
        self._tell_failure()
        if self._ranks.are_several and not (self._disk.failures or self._is_absence_told):
            self._tell_absent()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- losses and spikes -----------------------------------------------------------------

    def _hold(self) -> None:
        """Let no state go that is still to be written: a spike's is only some steps later."""
        spike = set[int]() if self._start is None else {self._start}
        self._ring.hold({*self._due} | spike | self._asked.starts)

    def _write_asked(self, last: int) -> None:
        for wanted, start in self._asked.done(last):
            self._write(start, wanted, "what was asked about")

    def _note(self, step: int, value: float) -> None:
        own = value
        if isinstance(self._late, SharedLoss):
            own, is_one_kind, failed = self._late.told(step)
            if not is_one_kind:
                self._watch.name(step, None)
            if others := [rank for rank in failed if rank != self._ranks.rank]:
                self._warn_absent(f"rank {others[0]} could not write its part")
        self._ring.add_loss(step, own)
        self._last = step
        onset = self._watch.hear(step, value)
        if onset is not None and self._spike is None:
            self._spike = onset
            self._start = self._ring.before(onset, lead=self._lead)
            self._tell("spike", onset, loss=value)

    def _hear(self, step: int, value: float) -> Rewind | None:
        self._note(step, value)
        while self._due and step >= self._due[0] + self._every + self._after:
            self._write(self._due.popleft(), None)
        self._write_asked(step - self._after)
        if self._spike is None or step < self._spike + self._after:
            return None
        onset, self._spike, self._start = self._spike, None, None
        start = self._ring.before(onset, lead=self._lead)
        self._write(start, onset)
        if self._in_place is None or start is None:
            return None
        return self._explain(onset, start, step)

    def _write(self, start: int | None, onset: int | None, what: str = "the spike") -> None:
        if start is None or start not in self._ring.steps:
            self._tell_loss(onset, what)
            return
        snapshot = self._disk.put(self._ring, start, last=self._last)
        spike = {} if onset is None else {"onset": onset, **self._disk.put_older(self._ring, start)}
        self._tell("snapshot", start, last_step=snapshot.last_step, **spike)

    def _explain(self, onset: int, start: int, now: int) -> Rewind | None:
        """Explain a spike beside the training; go back to before its cause if that mends it."""
        assert self._in_place is not None
        mended = self._in_place.explain(self._ring, self._watch, onset=onset, start=start, now=now)
        if mended is None:
            return None
        explanation, snapshot = mended
        override, start = explanation.override, snapshot.step
        assert override is not None
        put_state(self._training, snapshot.state)
        switch_sites(self._training.model, override.sites, override.scaling)
        self._again = self._ring.batches_from(start)
        self._ring = self._ring.emptied()
        self._watch.forget_from(start)
        self._asked.again_from(start)
        self._due.clear()
        self._disk.forget()
        self._late = LateLoss()
        self._next = start
        switched = [site.to_dict() for site in override.sites]
        self._tell("rewind", onset, to=start, sites=switched, scaling=override.scaling)
        return Rewind(step=start, batches=dict(self._again), explanation=explanation)

    def _tell_loss(self, onset: int | None, what: str) -> None:
        """Record that no state was left from before a step, and warn of the first."""
        if onset is None:
            return
        said = (
            f"{what} at step {onset} has no snapshot: the states from before it were dropped to "
            "stay within budget_gib, or none was taken; raise budget_gib"
        )
        self._tell("snapshot", onset, error=said)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(said, UnclampWarning, stacklevel=3)

    def _tell_failure(self) -> None:
        """Warn of a snapshot that could not be written, once."""
        failure = self._disk.take_failure()
        if failure is not None:
            warnings.warn(f"a snapshot was not kept: {failure}", UnclampWarning, stacklevel=3)

    def _tell_absent(self) -> None:
        """Warn of what other ranks have not written, where they may end without a word."""
        if absent := self._disk.incomplete(patience_s=PATIENCE_S):
            steps = ", ".join(map(str, sorted(absent)))
            warnings.warn(
                f"the snapshot before step {steps} is not whole yet: another rank had not written "
                f"its part after {PATIENCE_S:.0f} s, and where it never does there is none",
                UnclampWarning,
                stacklevel=3,
            )

    def _warn_absent(self, why: str) -> None:
        self._is_absence_told = True
        said = f"a snapshot is absent on all ranks: {why}"
        warnings.warn(said, UnclampWarning, stacklevel=3)

    def _tell(self, kind: str, step: int, **data: Any) -> None:
        """Record an event, which is one of all ranks."""
        if self._recorder is not None and self._ranks.is_first:
            self._recorder.event(kind, step, **{key: strict(value) for key, value in data.items()})
