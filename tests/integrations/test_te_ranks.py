"""Transformer Engine on several ranks: each holds the amaxes of the group."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from integrations.te_standin import TE, DelayedScaling, Linear
from ranks import run_ranks
from unclamp import RunLog, record_transformer_engine

RANKS, STEPS = 2, 6


def _reduce(te: TE) -> None:
    """Reduce row 0 of each history over ranks, as `reduce_and_update_fp8_tensors` does before."""
    update = te.reduce_and_update

    def reduced(*, forward: bool) -> None:
        for module in te.modules:
            state = module.fp8_meta["scaling_fwd" if forward else "scaling_bwd"]
            dist.all_reduce(state.amax_history[0], op=dist.ReduceOp.MAX)
        update(forward=forward)

    te.reduce_and_update = reduced  # type: ignore[method-assign]


def _train(rank: int, folder: str, reduces: bool) -> None:
    torch.manual_seed(0)
    te = TE("2.x")
    if reduces:
        _reduce(te)
    model = nn.Sequential(Linear(te, "0", 8, 8))
    recipe = DelayedScaling(amax_history_len=4, reduce_amax=reduces)
    with record_transformer_engine(model, f"{folder}/run") as recorder:
        for step in range(STEPS):
            # Rank 1 sees the outliers.
            x = torch.full((4, 8), 1.0 + step + (100.0 if rank == 1 and step == 3 else 0.0))
            with te.autocast(recipe):
                out = model(x)
            out.sum().backward()
            recorder.step(step, loss=float(step + rank))


@pytest.mark.parametrize("reduces", [True, False], ids=["reduced", "apart"])
def test_rows_of_ranks_that_reduce_their_amaxes_count_once(tmp_path: Path, reduces: bool):
    run_ranks(RANKS, _train, str(tmp_path), reduces)
    with RunLog.open(tmp_path / "run") as log:
        rows = log.sql(
            "SELECT rank, step, amax, replicated FROM casts JOIN sites USING (site, rank) "
            "WHERE role = 'input'"
        ).to_pylist()
        windows = log.windows()
        totals = {s.role: t for s, t in zip(windows.sites, windows.totals, strict=True)}
        notes = log.header.notes
        events = log.sql("SELECT data FROM events WHERE kind = 'transformer_engine'")
        told = [json.loads(data)["reduced"] for data in events["data"].to_pylist()]
        losses = log.steps()["loss"].to_pylist()
    assert len(rows) == RANKS * STEPS
    assert sorted(losses) == sorted(float(step + rank) for step in range(STEPS) for rank in (0, 1))
    by_rank = {(row["rank"], row["step"]): row for row in rows}
    assert [by_rank[1, step]["replicated"] for step in range(STEPS)] == [reduces] * STEPS
    assert by_rank[1, 3]["amax"] == 104.0
    assert by_rank[0, 3]["amax"] == (104.0 if reduces else 4.0)
    assert any("On 2 ranks Transformer Engine reduces amaxes" in note for note in notes)
    assert told == [reduces] * RANKS
    assert totals["input"].rows == (STEPS if reduces else RANKS * STEPS)
