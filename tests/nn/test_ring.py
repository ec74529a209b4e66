"""Histories as rings, against a deque a row, and a ledger's against a list a site."""

import pickle
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from unclamp import Delayed, Dynamic, Recipe
from unclamp.nn import Ledger, Site
from unclamp.nn.ring import ONE_CHUNK, Ring
from unclamp.numerics import Stat
from unclamp.reference import float32
from unclamp.scaling import Scaling

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 16, ONE_CHUNK - 1, ONE_CHUNK, ONE_CHUNK + 1, 100, 129, 300, 1024]


def empty(length: int) -> deque[float]:
    return deque([0.0] * length, maxlen=length)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_ring_is_a_deque_a_row(length: int) -> None:
    rows = 11
    draw = torch.Generator().manual_seed(length)
    ring, naive = Ring(rows, length, CPU), [empty(length) for _ in range(rows)]
    for step in range(min(3 * length, 500) + 40):
        measured = torch.rand(rows, generator=draw) < 0.8
        # Few values, so that many are equal.
        newest = torch.randint(0, 30, (rows,), generator=draw).to(torch.float32)
        ring.push(torch.where(measured, newest, -1), measured)
        for row in measured.nonzero().flatten().tolist():
            naive[row].appendleft(float(newest[row]))
        window = torch.randint(1, length + 1, (rows,), generator=draw, dtype=torch.int32)
        window[0] = length
        windows = [list(past)[:size] for past, size in zip(naive, window.tolist(), strict=True)]
        amax = ring.amax(window)
        assert amax.tolist() == [max(past) for past in windows]
        ages = [past.index(max(past)) + 1 for past in windows]
        assert ring.age_of(amax, window).tolist() == ages
        assert ring.age_of(amax + 1, window).tolist() == [0] * rows
        if step % 17 == 0:
            every = ring.newest(torch.arange(rows), length)
            assert every.tolist() == [list(past) for past in naive]
            some, kept = torch.tensor([1, 3]), length // 2 + 1
            ring.write(some, every[some, :kept])
            for row in (1, 3):
                naive[row] = deque([*list(naive[row])[:kept], *[0.0] * (length - kept)], length)


def test_a_longer_history_than_fits_keeps_its_newest() -> None:
    ring = Ring(2, 3, CPU)
    ring.write(torch.tensor([1]), torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]))
    assert ring.newest(torch.arange(2), 3).tolist() == [[0, 0, 0], [5, 4, 3]]


def test_an_amax_of_zero_pushes_the_others_on() -> None:
    ring = Ring(1, 2, CPU)
    window, yes = torch.tensor([2]), torch.tensor([True])
    seen = []
    for amax in (3.0, 0.0, 0.0):
        ring.push(torch.tensor([amax]), yes)
        seen.append(ring.amax(window).item())
    assert seen == [3, 3, 0]


def test_a_ring_without_rows_does_nothing() -> None:
    for length in (4, 200):
        ring = Ring(0, length, CPU)
        ring.push(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        assert ring.amax(torch.zeros(0, dtype=torch.int32)).shape == (0,)


def test_a_push_writes_in_place() -> None:
    ring = Ring(3, 200, CPU)
    before = [t.data_ptr() for t in vars(ring).values() if isinstance(t, Tensor)]
    ring.push(torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert [t.data_ptr() for t in vars(ring).values() if isinstance(t, Tensor)] == before


# ---- a ledger ------------------------------------------------------------------------------


@dataclass
class Naive:
    """One site by hand: its history newest first, without an end, and its scale."""

    scaling: Scaling
    past: list[float] = field(default_factory=list)
    remembered: int = 0
    scale: float = 0.0

    def rescale(self) -> None:
        window = self.scaling.history_len or 16
        if self.scaling.reduce == "most_recent":
            window = 1
        amax = max(self.past[:window], default=0.0)
        if amax > 0:
            self.scale = float32(448 / amax)

    def history(self) -> list[float]:
        return (self.past + [0.0] * self.remembered)[: self.remembered]


def delayed(length: int) -> Delayed:
    return Delayed(history_len=length, reduce="most_recent" if length % 5 == 0 else "max")


def made(lengths: list[int]) -> Ledger:
    operand = Recipe().plan("").operands["input"]
    ledger = Ledger()
    sites = [Site.of(str(i), "input", operand) for i in range(len(lengths))]
    ledger.add([s.switched(delayed(n)) for s, n in zip(sites, lengths, strict=True)])
    return ledger


@pytest.mark.parametrize("seed", range(6))
def test_a_ledger_is_a_list_a_site_over_updates_switches_and_restores(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    lengths = [number(1, 90 if seed % 2 else 12) for _ in range(7)]
    ledger = made(lengths)
    naive = [Naive(delayed(n), remembered=n) for n in lengths]
    longest = max(lengths)
    for _ in range(250):
        action = number(0, 20)
        site = number(0, len(naive))
        one = naive[site]
        if action == 0:
            scaling = Dynamic() if number(0, 3) == 0 else delayed(number(1, 130))
            ledger.switch({site: scaling})
            one.scaling = scaling
            one.remembered = max(one.remembered, scaling.history_len or 16)
            longest = max(longest, one.remembered)
            one.rescale()
        elif action == 1:
            past = [float(number(1, 99)) for _ in range(number(1, 150))]
            ledger.restore(site, torch.tensor(past), torch.tensor(3.5))
            one.past, one.scale = past[: one.remembered], 3.5
            one.rescale()
        elif action == 2:
            ledger = pickle.loads(pickle.dumps(ledger))
        else:
            amaxes = [float(number(0, 50)) if number(0, 4) else -1.0 for _ in naive]
            ledger.pending[:, Stat.AMAX] = torch.tensor(amaxes, dtype=torch.float64)
            ledger.update()
            for each, amax in zip(naive, amaxes, strict=True):
                if amax >= 0:
                    each.past.insert(0, amax)
                    each.rescale()
        for each in naive:
            del each.past[longest:]  # beyond the longest history nothing is kept
        assert [ledger.history_of(i).tolist() for i in range(7)] == [n.history() for n in naive]
        assert ledger.scale.tolist() == [n.scale for n in naive]


def test_histories_are_shown_newest_first_and_as_long_as_the_longest() -> None:
    ledger = made([2, 70])
    for amax in (1.0, 2.0, 3.0):
        ledger.pending[:, Stat.AMAX] = amax
        ledger.update()
    assert ledger.amax_history.shape == (2, 70)
    assert ledger.amax_history[1, :4].tolist() == [3, 2, 1, 0]
    assert ledger.history_of(0).tolist() == [3, 2]
