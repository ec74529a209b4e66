"""From a run's folder to an explanation: which spike, which snapshot, which code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from unclamp.analysis.curves import Losses, run_losses
from unclamp.analysis.explanation import Explanation
from unclamp.analysis.horizon import clamped_before
from unclamp.analysis.spikes import Spike, find_spikes, rise_at
from unclamp.errors import ReplayError, naming_arguments
from unclamp.explain.chain import earlier_snapshots
from unclamp.explain.facts import check_belongs, load_functions
from unclamp.explain.investigate import investigate
from unclamp.explain.launched import built, meeting, warm_up
from unclamp.explain.limits import Limits
from unclamp.explain.parts import check_ranks
from unclamp.explain.ranks import RankFailed, Ranks
from unclamp.explain.script import changes_of
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.store import read_all_facts, read_snapshot
from unclamp.explain.training import Build, Step, keeping_random_state
from unclamp.explain.watch import about_kind, kin_of, level_before, trains
from unclamp.runlog import RunLog, starting_no_run

LEAD = 4
"""Least steps from snapshot to spike that are wished for, as in `Snapshots`."""
SHOWN_SPIKES = 6


@naming_arguments
def explain_spike(
    run: str | Path,
    spike: int | None = None,
    *,
    at: int | None = None,
    build: Build | str | None = None,
    step: Step | str | None = None,
    limits: Limits = Limits(),
    on_progress: Callable[[Explanation], None] = lambda explanation: None,
) -> Explanation:
    """Say what caused a spike of a run, by replaying it from a snapshot.

    Args:
        run: The run's folder, with snapshots below it.
        spike: Its number as `unclamp spikes` shows it (`Spike.number`). Without it the highest
            that has a snapshot; where that follows closely on others, the first of them.
        at: A step to ask about in place of a spike, detected or not: it and the steps after it,
            as long as their losses are above the level before it. Not with `spike`.
        build: Makes the training as the run did: a function, "module:function", or
            "FILE.py:function" of a script, which is not run (`unclamp.explain.script`); what the
            snapshot names without it.
        step: Does a step; likewise.
        limits: How much to ask.
        on_progress: Called after each replay with the answer so far, which is also in
            RUN/explain-<onset>.json.

    Raises:
        ReplayError: No spike, no snapshot before it, no batches, both `spike` and `at`, a loss at
            `at` that is not above the level before, or code, recipe or model that do not belong to
            the snapshot.
        AnalysisError: The run recorded no loss, or none of step `at`.
        RunLogError: The folder holds no run.

    A run of several ranks is replayed by as many, each of which calls this: under torchrun, where
    the process group is made here if it is not there yet, or at the end of the training itself.
    All return the same answer; the first rank writes it.
    """
    try:
        with meeting() as ranks:
            asked = partial(_plan, Path(run), spike, at)
            return _explain(ranks.first(asked), build, step, limits, on_progress, ranks)
    except RankFailed as error:
        raise ReplayError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is asked, as the first rank reads it from the run's folder for all.

    Attributes:
        run: The folder.
        spike: What is to be explained.
        level: The loss that it rises from.
        spikes: All spikes of the loss.
        kin: Steps of the spike's kind.
        path: The snapshot to begin from.
        facts: What that says of itself.
        found: All snapshots.
        notes: What a reader must know.
    """

    run: Path
    spike: Spike
    level: float
    spikes: list[Spike]
    kin: frozenset[int] | None
    path: Path
    facts: Mapping[str, Any]
    found: list[Path]
    notes: tuple[str, ...]


def _plan(run: Path, spike: int | None, at: int | None) -> _Plan:
    with RunLog.open(run) as log:
        losses = run_losses(log)
    spikes = find_spikes(losses.values, steps=losses.steps, groups=losses.groups)
    found, unreadable = read_all_facts(run)
    if at is None:
        chosen, path = _choose(run, spikes, spike, found, unreadable)
    else:
        if spike is not None:
            raise ReplayError(f"expected a spike or a step, got both: spike {spike}, step {at}")
        chosen = _asked(spikes, losses, at)
        path = _reaching(f"step {at}", [chosen], found, unreadable, run)[1]
    kin = kin_of(chosen.group, losses.steps, losses.groups)
    return _Plan(
        run=run,
        spike=chosen,
        level=level_before(losses.steps, losses.values, chosen.onset, losses.groups),
        spikes=spikes,
        kin=kin,
        path=path,
        facts=found[path],
        found=[*found],
        notes=(*unreadable, *_about_train(spikes, chosen), *about_kind(chosen, kin)),
    )


def _explain(
    plan: _Plan,
    build: Build | str | None,
    step: Step | str | None,
    limits: Limits,
    on_progress: Callable[[Explanation], None],
    ranks: Ranks,
) -> Explanation:
    run = plan.run
    check_ranks(plan.facts, ranks, run)
    snapshot = ranks.together(lambda: read_snapshot(plan.path, rank=ranks.rank))
    with keeping_random_state():
        arguments = snapshot.facts["arguments"] if build is None else {}
        with starting_no_run("a replay is being built"):
            builder, stepper = _functions(snapshot, build, step)
            training = built(lambda: builder(**arguments), ranks)
        ranks.together(
            lambda: check_belongs(
                snapshot.facts, training.model, build=builder, step=stepper, anyway=limits.anyway
            )
        )
        warm_up(training, stepper, snapshot, ranks)
        changes = changes_of(snapshot.facts) if build is None or step is None else ()
        return investigate(
            training,
            stepper,
            snapshot,
            spike=plan.spike,
            level=plan.level,
            spikes=plan.spikes,
            kin=plan.kin,
            run=run,
            older=earlier_snapshots(plan.found, snapshot, ranks=ranks),
            clamped_before=lambda n: ranks.first(partial(clamped_before, run, n)),
            limits=limits,
            notes=(*changes, *plan.notes),
            on_progress=on_progress,
            ranks=ranks,
        )


def _choose(
    run: Path,
    spikes: list[Spike],
    wanted: int | None,
    found: Mapping[Path, Mapping[str, Any]],
    unreadable: tuple[str, ...],
) -> tuple[Spike, Path]:
    """Return a spike and the snapshot to start from."""
    if not spikes:
        raise ReplayError(f"the loss of {run} has no spike, so there is nothing to explain")
    listed = "; ".join(
        f"{s.number} at step {s.onset} ({s.height:.2f}x)" for s in spikes[:SHOWN_SPIKES]
    )
    listed += "" if len(spikes) <= SHOWN_SPIKES else f"; ... {len(spikes)} in all"
    candidates = spikes if wanted is None else [s for s in spikes if s.number == wanted]
    if not candidates:
        raise ReplayError(
            f"expected the number of a spike of the run, got {wanted}; it has {listed}"
        )
    in_turn = _in_turn(spikes) if wanted is None else candidates
    return _reaching(f"the spike ({listed})", in_turn, found, unreadable, run)


def _asked(spikes: list[Spike], losses: Losses, at: int) -> Spike:
    """Return what is asked about at a step: the spike that begins there, or any other rise."""
    detected = next((spike for spike in spikes if spike.onset == at), None)
    if detected is not None:
        return detected
    level = level_before(losses.steps, losses.values, at, losses.groups)
    group = dict(zip(losses.steps, losses.groups, strict=False)).get(at)
    kin = kin_of(group, losses.steps, losses.groups)
    own = [(n, v) for n, v in zip(losses.steps, losses.values, strict=True) if not kin or n in kin]
    steps, values = [n for n, _ in own], [v for _, v in own]
    rise = replace(rise_at(values, steps=steps, at=at, level=level), group=group)
    loss = values[steps.index(at)]
    if loss <= level:
        raise ReplayError(
            f"the loss of step {at} is {loss:.6g}, not above the {level:.6g} of the "
            "calm steps before it, so there is no rise to explain: ask about a step whose loss is"
        )
    return rise


def _reaching(
    what: str,
    spikes: list[Spike],
    found: Mapping[Path, Mapping[str, Any]],
    unreadable: tuple[str, ...],
    run: Path,
) -> tuple[Spike, Path]:
    """Return the first of some spikes that a snapshot reaches, and that snapshot."""
    if not found:
        raise ReplayError(
            f"{run} holds no snapshots, so nothing can be replayed: train with "
            "unclamp.Snapshots(training, path, ...), as docs/explain.md shows; studies take them "
            "by themselves"
        )
    ranges = {path: (facts["step"], facts["last_step"]) for path, facts in found.items()}
    for spike in spikes:
        path = _snapshot_for(spike, ranges)
        if path is not None:
            return spike, path
    covered = ", ".join(f"{first} to {last}" for first, last in sorted(set(ranges.values())))
    raise ReplayError(
        f"no snapshot reaches {what}: the run has the state and batches of steps {covered}; take "
        "snapshots more often, Snapshots(..., every=..., keep=...), or name steps to keep, "
        "Snapshots.keep(step), next time"
        + "".join(f". {note.removesuffix('.')}" for note in unreadable)
    )


def _in_turn(spikes: list[Spike]) -> list[Spike]:
    """Return spikes in the order in which they are worth explaining: a train from its first on."""
    highest_first = sorted(trains(spikes), key=lambda train: -max(s.height for s in train))
    return [spike for train in highest_first for spike in train]


def _about_train(spikes: list[Spike], chosen: Spike) -> tuple[str, ...]:
    """Say that a spike is one of a train, if it is."""
    train = next((train for train in trains(spikes) if chosen in train), [chosen])
    if len(train) == 1:
        return ()
    shown = ", ".join(str(spike.onset) for spike in train[:SHOWN_SPIKES])
    shown += "" if len(train) <= SHOWN_SPIKES else f" and {len(train) - SHOWN_SPIKES} more"
    which = "the first" if chosen == train[0] else f"no. {train.index(chosen) + 1}, not the first,"
    return (
        f"It is {which} of {len(train)} spikes that follow closely on one another, at steps "
        f"{shown}, and may have one cause.",
    )


def _snapshot_for(spike: Spike, ranges: dict[Path, tuple[int, int]]) -> Path | None:
    """Return the newest snapshot some steps before the spike that has its batches."""
    reaching = {p: r for p, r in ranges.items() if r[0] <= spike.onset <= r[1]}
    early = {p: r for p, r in reaching.items() if r[0] <= spike.onset - LEAD}
    among = early or reaching
    if not among:
        return None
    sign = 1 if early else -1
    return max(among, key=lambda p: (sign * among[p][0], among[p][1]))


def _functions(
    snapshot: Snapshot, build: Build | str | None, step: Step | str | None
) -> tuple[Build, Step]:
    found: dict[str, Any] = {}
    for given, key, what in ((build, "build", "build"), (step, "step_function", "step")):
        found[what] = given if given is not None else snapshot.facts.get(key)
        if found[what] is None:
            raise ReplayError(
                f"the snapshot does not name a {what} function that another process can find: "
                f"name it with --{what} MODULE:FUNCTION (or FILE.py:FUNCTION), or give Snapshots a "
                "function of a module or of the script's top level"
            )
    named = {what: name for what, name in found.items() if isinstance(name, str)}
    facts = snapshot.facts
    found |= load_functions(named, script=facts.get("script"), argv=facts.get("argv", ()))
    return found["build"], found["step"]
