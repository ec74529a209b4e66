"""Runs of several ranks: replays bit for bit, one answer, and snapshots of all ranks or of none.

The truth is found without a replay, by training anew on as many ranks.
"""

import os
import statistics
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import unclamp
from ranks import run_ranks
from truths.ranked import BAD_RANK, Ranked, explain, losses_with, record, step
from truths.trainings import SPIKE, Case
from unclamp.analysis.counterfactual import ACTUAL, OWN_SCALES
from unclamp.errors import ReplayError
from unclamp.explain import Explanation, Snapshots, Training, explain_spike
from unclamp.explain.shards import has_parts
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.store import (
    FACTS_FILE,
    find_snapshots,
    read_facts,
    read_snapshot,
    write_snapshot,
)
from unclamp.names import SiteName

MANY_S = 300
"""Seconds after which ranks that do not end are killed."""
DECOY = SiteName("paths.1.1", "input")


def mean(losses: list[list[float]]) -> list[float]:
    """Return the mean loss of each step over the ranks."""
    return [statistics.fmean(one) for one in zip(*losses, strict=True)]


def losses_of(found: Explanation, question: Any) -> dict[int, float]:
    """Return the losses under a question."""
    return next(dict(c.losses) for c in found.counterfactuals if c.question == question)


# ---- what is found -------------------------------------------------------------------------------


def planted(rank: int, run: str, ranked: Ranked) -> list[Any]:
    """Record, explain twice, and train anew with the culprits un-clamped, and with the decoy."""
    losses = record(ranked, Path(run), rank)
    found = explain(ranked, Path(run), replays=40)
    again = explain(ranked, Path(run), replays=60)
    free = losses_with(ranked, rank, unclamped=ranked.case.culprits)
    return [losses, found, again, free, losses_with(ranked, rank, unclamped=[DECOY])]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_clamp_on_one_rank_is_named_and_replays_are_bit_for_bit(
    wrapper: str, tmp_path: Path
) -> None:
    ranked = Ranked(case=Case(), wrapper=wrapper)
    told = run_ranks(2, planted, str(tmp_path / "run"), ranked, patience_s=MANY_S)
    run, founds, again, free, decoy = zip(*told, strict=True)
    found = founds[0]
    assert founds[1].to_dict() == found.to_dict()  # of all ranks one answer
    assert found.reproduced
    plain = losses_of(found, ACTUAL)
    assert plain == {n: mean([*run])[n] for n in plain}
    # The truth: the culprit's clamps make the spike, and not those of what clamps beside it.
    level = mean([*run])[SPIKE - 1]
    assert mean([*free])[SPIKE] < 1.1 * level
    assert mean([*decoy])[SPIKE] > 2 * level
    assert found.named == ranked.case.culprits
    assert found.verdict == "clamping"
    assert found.clamping_share is not None
    without = mean([*run])[SPIKE] - found.clamping_share * (mean([*run])[SPIKE] - found.level)
    assert without == pytest.approx(mean([*free])[SPIKE], rel=0.02)
    assert f"paths.0.1 input on rank {BAD_RANK}" in found.words()
    assert "Replayed on 2 ranks" in found.words()
    # Asked again it goes on from the answers that are there.
    assert again[0].named == again[1].named == found.named
    assert again[0].replays == found.replays
    with pytest.raises(ReplayError) as error:
        explain_spike(tmp_path / "run")
    assert str(error.value) == (
        "the run was recorded on 2 ranks, and this is 1: "
        f"torchrun --nproc-per-node 2 -m unclamp explain {tmp_path / 'run'}"
    )
    is_sharded = [
        has_parts(read_snapshot(find_snapshots(tmp_path / "run")[-1], rank=rank).state)
        for rank in range(2)
    ]
    assert is_sharded == 2 * [wrapper == "fsdp2"]


def asked(rank: int, run: str, ranked: Ranked, **settings: Any) -> list[Any]:
    """Record and explain."""
    return [record(ranked, Path(run), rank, **settings), explain(ranked, Path(run), replays=40)]


def test_a_bad_batch_of_one_rank_is_not_blamed_on_clamping(tmp_path: Path) -> None:
    ranked = Ranked(case=Case(other="bad batch", size=8.0, parts=(1.0,), decoys=2))
    _, founds = zip(*run_ranks(2, asked, str(tmp_path), ranked, patience_s=MANY_S), strict=True)
    assert founds[0].verdict == "not clamping"
    assert founds[0].named == []
    assert founds[0].clamped_sites > 0


def with_own_scales(rank: int, run: str, ranked: Ranked) -> list[Any]:
    losses, found = asked(rank, run, ranked)
    start = found.snapshot_step
    return [losses, found, losses_with(ranked, rank, alone_from=start)]


def test_scales_of_each_rank_its_own_are_what_training_on_alone_gives(tmp_path: Path) -> None:
    # The other rank's outliers have grown to a quarter of the planted one: with shared histories
    # less of it is clamped than with those of the bad rank alone, once these have forgotten.
    case = Case(scaling=unclamp.Delayed(history_len=2))
    ranked = Ranked(case=case, rises=True)
    told = run_ranks(2, with_own_scales, str(tmp_path), ranked, patience_s=MANY_S)
    run, founds, alone = zip(*told, strict=True)
    found = founds[0]
    own = losses_of(found, OWN_SCALES)
    assert own == {n: mean([*alone])[n] for n in own}
    assert own[SPIKE] > 1.3 * mean([*run])[SPIKE]
    share = (mean([*run])[SPIKE] - own[SPIKE]) / (mean([*run])[SPIKE] - found.level)
    assert found.others["own_scales"] == pytest.approx(share, rel=0.05)
    assert "With scales of each rank its own from step 30 on" in found.words()
    assert "higher, with " in found.words()
    assert Explanation.from_dict(found.to_dict()).others == found.others


def test_where_ranks_have_the_same_batches_scales_of_their_own_are_not_asked_for(
    tmp_path: Path,
) -> None:
    founds = run_ranks(2, alike, str(tmp_path), patience_s=MANY_S)
    assert founds[0].verdict == "clamping"
    assert "own_scales" not in founds[0].others
    assert "on some ranks only" not in founds[0].words()


def alike(rank: int, run: str) -> Explanation:
    ranked = Ranked(case=Case())
    record(ranked, Path(run), BAD_RANK if rank >= 0 else rank)
    return explain(ranked, Path(run), replays=40)


@pytest.mark.slow
def test_three_ranks_add_up_in_the_run_s_order(tmp_path: Path) -> None:
    """DDP makes other buckets after its first step, and sums of three have an order."""
    ranked = Ranked(case=Case(paths=((1.0, 1.0), (1.0,)), decoys=2))
    _, founds = zip(*run_ranks(3, asked, str(tmp_path), ranked, patience_s=MANY_S), strict=True)
    assert founds[0].reproduced
    assert founds[0].named == ranked.case.culprits


# ---- snapshots: whole or absent ------------------------------------------------------------------


def looped(rank: int, run: str, how: str) -> list[str]:
    """Train without a recorder, and on rank 1 not as on others; return what it warns of."""
    if how == "fails" and rank == 1:  # in the way of the folder that it writes to
        folder = Path(run) / "snapshots" / f"step-000030-to-{SPIKE + 3:06d}"
        folder.mkdir(parents=True)
        (folder / ".rank-00001.part").touch()
    unclamp.explain.snapshots.PATIENCE_S = 0.5
    training = build()
    # What follows on the spike is whole at the end of the loop, or only when it is closed.
    after = 3 if how == "fails" else 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snapshots = Snapshots(training, run, build=build, step=step, every=5, after=after)
        for n, batch in snapshots.follow(Ranked(case=Case()).batches(rank)):
            snapshots.after(n, step(training, batch))
        if how == "fails" or rank == 0:
            snapshots.close()
    return [str(one.message) for one in caught if "snapshot" in str(one.message)]


def test_a_part_that_cannot_be_written_leaves_no_snapshot_and_all_ranks_are_warned(
    tmp_path: Path,
) -> None:
    first, second = run_ranks(2, looped, str(tmp_path), "fails", patience_s=MANY_S)
    names = [path.name for path in find_snapshots(tmp_path)]
    assert "step-000020-to-000029" in names  # an older one, which all have written
    assert f"step-000030-to-{SPIKE + 3:06d}" not in names
    assert [text.partition(":")[0] for text in first] == ["a snapshot is absent on all ranks"]
    assert [text.partition(":")[0] for text in second] == ["a snapshot was not kept"]


def test_a_rank_that_never_closes_leaves_no_snapshot_and_nobody_waits_for_ever(
    tmp_path: Path,
) -> None:
    first, _ = run_ranks(2, looped, str(tmp_path), "never closes", patience_s=MANY_S)
    assert find_snapshots(tmp_path) == []
    (said,) = first
    assert "is not whole yet: another rank had not written its part" in said


def uneven(rank: int, run: str) -> None:
    """Keep states within a budget, on one rank beside batches ten times as large."""
    model = torch.nn.Linear(64, 64, bias=False)
    training = Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0))
    batch = torch.zeros(1000 if rank else 100)
    budget = 5.5 * 4 * 64 * 64 / 2**30
    with Snapshots(training, run, budget_gib=budget, keep=8, write="all", after=0) as snapshots:
        for n in range(60):
            snapshots.before(n, batch)
            snapshots.after(n, 1.0)


def test_ranks_keep_the_same_states_whatever_their_batches_take(tmp_path: Path) -> None:
    run_ranks(2, uneven, str(tmp_path), patience_s=MANY_S)
    written = [(one["step"], one["last_step"]) for one in map(read_facts, find_snapshots(tmp_path))]
    parts = list((tmp_path / "snapshots").glob(f"*/rank-*/{FACTS_FILE}"))
    assert len(written) > 2
    assert len(parts) == 2 * len(written)


def write_part(run: Path, rank: int, launch: str) -> Path:
    facts = {"ranks": {"rank": rank, "count": 2, "launch": launch}}
    return write_snapshot(run, Snapshot(step=0, state={"rank": rank}, facts=facts))


def test_a_snapshot_is_there_when_the_last_part_is_and_parts_of_two_launches_are_none(
    tmp_path: Path,
) -> None:
    path = write_part(tmp_path, 0, "first")
    assert find_snapshots(tmp_path) == []
    write_part(tmp_path, 1, "first")
    assert find_snapshots(tmp_path) == [path]
    assert [read_snapshot(path, rank=rank).state["rank"] for rank in range(2)] == [0, 1]
    write_part(tmp_path, 1, "second")  # torchrun has started anew
    assert find_snapshots(tmp_path) == []
    write_part(tmp_path, 0, "second")
    assert find_snapshots(tmp_path) == [path]


def test_a_rank_that_begins_leaves_another_the_folder_that_it_has_just_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 makes the snapshot's folder; rank 0 begins its part before rank 1 makes its own."""
    mkdir, begun, done = os.mkdir, threading.Event(), threading.Event()
    late = threading.Thread(target=write_part, args=(tmp_path, 0, "first"), daemon=True)

    def ordered(path: Path, *args: Any, **settings: Any) -> None:
        if threading.current_thread() is late:  # all that it does before it makes a folder is done
            begun.set()
            assert done.wait(60)
        mkdir(path, *args, **settings)
        if Path(path).name.startswith("step-") and late.ident is None:
            late.start()
            assert begun.wait(60)

    monkeypatch.setattr(os, "mkdir", ordered)
    path = write_part(tmp_path, 1, "first")
    assert find_snapshots(tmp_path) == []
    done.set()
    late.join(60)
    assert find_snapshots(tmp_path) == [path]


def build() -> Training:
    """The default case."""
    return Ranked(case=Case()).build()


# ---- what is refused -----------------------------------------------------------------------------


def _fsdp1(model: torch.nn.Module) -> torch.nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def refused(rank: int, run: str) -> list[str]:
    """Return why Snapshots cannot be made: in place, with FSDP1, and on one rank only."""
    training = build()
    asked: list[tuple[Training, dict[str, Any]]] = [
        (training, {"on_spike": "explain"}),
        (replace(training, model=_fsdp1(torch.nn.Linear(4, 4))), {}),
        (training, {}),
    ]
    said = []
    for other, settings in asked:
        if other is training and not settings:
            if rank == 1:  # of those who have to make them
                break
            unclamp.explain.ranks.MEETING_S = 0.5
        with pytest.raises(ReplayError) as error:
            Snapshots(other, run, build=build, step=step, **settings)
        said.append(str(error.value))
    return said


def test_what_cannot_be_done_on_several_ranks_is_said(tmp_path: Path) -> None:
    in_place, fsdp1, alone = run_ranks(2, refused, str(tmp_path), patience_s=MANY_S)[0]
    assert 'on_spike="explain" is for one process, and these are 2 ranks' in in_place
    assert "use torch's fully_shard" in fsdp1
    assert "expected all 2 ranks to come here, and 1 did" in alone
