"""`ScalingState` on several ranks: beside the weights, in one file or in a distributed checkpoint.

The truth is the run that was never interrupted.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import AdamW

from ranks import run_ranks
from truths.wrapped import RECIPE, Kind, quiet, state_of, train, wrapped
from unclamp import ConvertError, Delayed, Dynamic, PerBlock, Recipe, ScalingState, convert
from unclamp.nn import find_ledgers

KINDS: tuple[Kind, ...] = ("ddp", "fsdp1", "fsdp2")
BLOCKS = Recipe(
    input=Dynamic(),
    weight=Delayed(history_len=4, granularity=PerBlock(5, 5)),
    grad_output=Dynamic(),
)
"""Blocks of which each lies on one of two ranks."""


def apart(seed: int = 0, recipe: Recipe = RECIPE) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6, bias=False))
    convert(model, recipe, state="apart")
    return model


def whole(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {k: getattr(v, "full_tensor", lambda v=v: v)().tolist() for k, v in state.items()}


@quiet
def _saves_and_resumes(rank: int, kinds: tuple[Kind, ...], folder: Path) -> dict[str, Any]:
    ends = {}
    for kind in kinds:
        model = wrapped(apart(), kind)
        optimizer = AdamW(model.parameters(), lr=0.01)
        train(model, optimizer, kind, range(3))
        weights, others = get_state_dict(model, optimizer)
        assert not any("unclamp_" in key for key in weights)
        scaling = ScalingState(model)
        tree = {"model": weights, "optimizer": others, "scaling": scaling}
        save(tree, checkpoint_id=folder / kind)
        scaling.save(folder / f"{kind}.pt")
        went_on = train(model, optimizer, kind, range(3, 6)), state_of(model)
        for by in ("distributed", "file"):
            again = wrapped(apart(seed=1), kind)
            optimizer = AdamW(again.parameters(), lr=0.01)
            train(again, optimizer, kind, range(10, 12))
            weights, others = get_state_dict(again, optimizer)
            scaling = ScalingState(again)
            tree = {"model": weights, "optimizer": others}
            load(tree | ({"scaling": scaling} if by == "distributed" else {}),
                 checkpoint_id=folder / kind)  # fmt: skip
            if by == "distributed":  # it comes before the weights, here
                set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=others)
            else:
                set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=others)
                scaling.load(folder / f"{kind}.pt")
            ends[f"{kind} {by}"] = went_on == (
                train(again, optimizer, kind, range(3, 6)), state_of(again)
            )  # fmt: skip
    return ends


def test_a_resume_with_the_state_beside_goes_on_bit_for_bit_on_ranks(tmp_path: Path) -> None:
    for ends in run_ranks(2, _saves_and_resumes, KINDS, tmp_path):
        assert ends == {f"{kind} {by}": True for kind in KINDS for by in ("distributed", "file")}
    # The same file serves one process, and so does the checkpoint.
    for kind in KINDS:
        model, other = apart(seed=2), apart(seed=3)
        ScalingState(model).load(tmp_path / f"{kind}.pt")
        assert find_ledgers(model)[0].count() == 3
        weights = other.state_dict()
        _load({"model": weights, "scaling": ScalingState(other)}, tmp_path / kind)
        assert state_of(other) == state_of(model)


@quiet
def _load(tree: dict[str, Any], path: Path) -> None:
    load(tree, checkpoint_id=path)


@quiet
def _with_parts(rank: int, folder: Path) -> Any:
    kind: Kind = "tp"
    model = wrapped(apart(recipe=BLOCKS), kind)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, kind, range(3))
    scaling = ScalingState(model)
    try:
        scaling.save(folder / "one.pt")
        refused = ""
    except ConvertError as error:
        refused = str(error)
    save({"scaling": scaling}, checkpoint_id=folder / "parts")
    again = wrapped(apart(seed=1, recipe=BLOCKS), kind)
    train(again, AdamW(again.parameters(), lr=0.01), kind, range(10, 12))
    load({"scaling": ScalingState(again)}, checkpoint_id=folder / "parts")
    third = wrapped(apart(seed=1, recipe=BLOCKS), kind)
    train(third, AdamW(third.parameters(), lr=0.01), kind, range(10, 12))
    full = {k: torch.tensor(v) for k, v in whole(scaling.state_dict()).items()}
    ScalingState(third).load_state_dict(full)
    return refused, *(state_of(each) for each in (model, again, third))


def test_parts_of_a_weights_blocks_are_refused_in_a_file_and_find_their_place(tmp_path) -> None:
    ranks = run_ranks(2, _with_parts, tmp_path)
    for refused, model, again, third in ranks:
        assert "parts of 0.unclamp_weight_amax_history" in refused
        assert "dcp.save(" in refused
        assert model == again == third
    assert ranks[0][1] != ranks[1][1]
    assert not (tmp_path / "one.pt").exists()
