"""FSDP2 gathers codes, one byte an element, and no bit of a training is another."""

import gc
from typing import Any

import pytest
import torch
from gathering import BLOCKS, SCALINGS, SIZES, Seen, batch, converted, listening, net, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unclamp
from ranks import run_ranks
from unclamp import Dynamic, Recipe
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat


def _both(rank: int) -> dict[str, tuple[Seen, Seen]]:
    results = {}
    for name, scaling in SCALINGS.items():
        plain, model = converted(scaling), converted(scaling)
        assert len(unclamp.gather_codes(model).gathered) == len(SIZES) - 1
        results[name] = train(plain, rank), train(model, rank)
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_is_that_of_whole_weights(ranks: int) -> None:
    for results in run_ranks(ranks, _both):
        assert results.keys() == SCALINGS.keys()
        for plain, gathered in results.values():
            assert gathered == plain


def _replicated(rank: int) -> tuple[list[float], list[float]]:
    model, other = converted(Dynamic()), net()
    unclamp.gather_codes(model)
    unclamp.convert(other, Recipe.uniform(Dynamic()))
    replicas = DistributedDataParallel(other)
    return train(model, rank).losses, train(replicas, rank).losses


def test_training_is_that_of_replicas() -> None:
    for gathered, replicated in run_ranks(2, _replicated):
        assert gathered == replicated


def _blocks(rank: int) -> list[tuple[list[str], Seen, Seen]]:
    results = []
    for scaling in BLOCKS.values():
        plain, model = (converted(scaling, (32, 64, 96, 1)) for _ in range(2))
        left = list(unclamp.gather_codes(model).left.values())
        results.append((left, train(plain, rank), train(model, rank)))
    return results


def test_blocks_have_the_scales_of_their_own_rank() -> None:
    for results in run_ranks(2, _blocks):
        for left, plain, gathered in results:
            assert left == ["its shards on 2 ranks do not end where its blocks do"]
            assert gathered == plain


# ---- on the wire -------------------------------------------------------------------------------


def _wire(rank: int) -> dict[str, Any]:
    return {name: _wire_of(rank, name) for name in ("static", "delayed", "guarded", "dynamic")}


def _wire_of(rank: int, name: str) -> Any:
    model = converted(SCALINGS[name])
    unclamp.gather_codes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(3):
        with listening() as forward:
            loss = model(batch(step, rank)).square().mean()
        with listening() as backward:
            loss.backward()
        with listening() as after:
            optimizer.step()
        optimizer.zero_grad()
        steps.append((forward, backward, after))
    return steps


def test_an_element_is_one_byte_and_no_scale_needs_a_collective_of_its_own() -> None:
    # ceil(63 / 2) rows of 32, 32 of 63, and 1 of 64; biases stay in float32.
    codes = [32 * 32, 32 * 63, 1 * 64]
    biases = [32 * 4, 32 * 4, 4]
    expected = [a + b for a, b in zip(codes, biases, strict=True)]
    for results in run_ranks(2, _wire):
        for name, steps in results.items():
            for number, (forward, backward, after) in enumerate(steps):
                assert forward.gathered == expected
                assert sorted(backward.gathered) == sorted(expected)
                amaxes = [n for n in forward.reduced if n == 4 * 3]
                # Where no scale is known one collective measures all weights, before the first.
                is_measured = name in ("guarded", "dynamic") or (number == 0 and name != "static")
                assert amaxes == [4 * 3] * is_measured
                assert number == 0 or forward.reduced == amaxes
                assert backward.reduced == []
                assert after.gathered == []
                assert number == 0 or len(after.reduced) == 1


def _alive(rank: int) -> list[list[int]]:
    model = converted(Dynamic(), (32, 74, 58, 1))
    unclamp.gather_codes(model)
    found: list[list[int]] = []

    def look(*_: Any) -> None:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in tensors
            if t.shape == (58, 74) and not t.is_meta
        }
        found.append([size for size in storages.values() if size])

    block = model[1]
    assert isinstance(block, nn.Sequential)
    block[0].register_forward_hook(look)
    block[0].register_full_backward_pre_hook(look)
    loss = model(batch(0, rank)).square().mean()
    look()
    loss.backward()
    model.zero_grad()
    look()
    return found


def test_no_whole_weight_is_alive_but_its_codes_and_these_while_they_are_multiplied() -> None:
    for during_forward, between, during_backward, after in run_ranks(2, _alive):
        assert during_forward == during_backward == [58 * 74]
        assert between == after == []


def _counts(rank: int) -> dict[str, tuple[list[list[float]], list[list[float]]]]:
    return {name: _counts_of(rank, name) for name in ("static", "delayed", "guarded")}


def _counts_of(rank: int, name: str) -> tuple[list[list[float]], list[list[float]]]:
    seen: dict[str, Tensor] = {}
    for kind in ("plain", "gathered"):
        model = converted(SCALINGS[name])
        if kind == "gathered":
            unclamp.gather_codes(model)
        (ledger,) = find_ledgers(model)
        ledger.subscribe(lambda update, kind=kind: seen.update({kind: update.stats}))
        train(model, rank, steps=4)
    rows = [n for n, site in enumerate(ledger.sites) if site.role == "weight"]
    return seen["plain"][rows].tolist(), seen["gathered"][rows].tolist()


def test_counts_of_the_shards_add_up_to_those_of_the_weights() -> None:
    results = run_ranks(2, _counts)
    for name in results[0]:
        _compare(
            name,
            [[torch.tensor(x, dtype=torch.float64) for x in result[name]] for result in results],
        )


def _compare(name: str, results: list[list[Tensor]]) -> None:
    plain = results[0][0]
    total = results[0][1] + results[1][1]
    for stat in (Stat.ELEMENTS, Stat.SATURATED, Stat.UNDERFLOWED, Stat.NONFINITE):
        assert torch.equal(total[:, stat], plain[:, stat])
    assert plain[:, Stat.ELEMENTS].tolist() == [32 * 63, 63 * 64, 64]
    torch.testing.assert_close(total[:, Stat.SQUARE], plain[:, Stat.SQUARE])
    largest = torch.stack([gathered[:, Stat.AMAX] for _, gathered in results]).amax(0)
    assert torch.equal(largest, plain[:, Stat.AMAX])
    if name == "static":
        assert plain[:, Stat.SATURATED].sum() == 0
    if name == "guarded":
        assert total[:, Stat.SATURATED].sum() == 0
        for _, gathered in results:
            assert torch.equal(gathered[:, Stat.RECAST], plain[:, Stat.RECAST])
