"""What a cast launches, and that the host asks the device nothing; run as `interpreted_gpu.py` is.

Launches are counted twice: kernels where Triton's interpreter runs them, and torch's operators
where they are dispatched, views and fresh memory aside.
"""

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import unclamp
from unclamp import E4M3FN, MX, Delayed, Dynamic, Format, Guarded, PerBlock, PerRow, Recipe
from unclamp.nn import find_ledgers
from unclamp.numerics import CastPlan, Stat
from unclamp.numerics.cast import quantize_plain
from unclamp.numerics.gpu import DEVICE_PATH, cast, slots
from unclamp.numerics.gpu.cast import numbers, quantize_tensor
from unclamp.numerics.quantize import quantize_by

# The interpreter computes with numpy, which warns of what FP8 is about; blocks are dequantised.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:a GEMM of FP8 operands runs dequantised"),
]

FREE = {"empty", "empty_strided", "new_empty", "empty_like", "detach", "_unsafe_view"}
"""Operators that launch nothing, beside those that torch itself calls views."""


class Launches(TorchDispatchMode):
    """Notes by name what would be launched on a device; no one may ask it anything."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dispatched = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.dispatched += 1
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), (
            f"the host waits for the device: {name}"
        )
        if name not in FREE and not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give the names of what is launched meanwhile."""
    with noted(monkeypatch) as mode:
        yield mode.names


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Note what is launched and dispatched meanwhile."""
    mode = Launches()
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        mode.names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own
            run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        with mode:
            yield mode


@pytest.fixture(autouse=True)
def _on_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_PATH, "interpreter")
    numbers(E4M3FN)  # looked up once in a process


def plan(**settings: Any) -> CastPlan:
    return CastPlan(format=E4M3FN, **settings)


X = torch.linspace(-3, 400, 64 * 64).to(torch.bfloat16).view(64, 64)
ONE = ["cast_tiles"]
TWO = ["cast_tiles", "cast_again"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("scale", "guard", "measured", "expected"),
    [
        (2.0, False, True, ONE),
        (2.0, False, False, TWO),
        (0.0, False, False, TWO),
        (0.0, False, True, ONE),
        (0.5, True, True, TWO),
        (2.0, True, True, TWO),
        (None, False, False, TWO),
        (None, False, True, TWO),
    ],
)
def test_launches_of_a_cast_with_one_scale(monkeypatch, scale, guard, measured, expected, turned):
    given = None if scale is None else torch.tensor(scale)
    with launches(monkeypatch) as names:
        quantize_by(X, plan(guard=guard), given, 1, turned=turned, measured=measured)
    assert names == expected


@pytest.mark.parametrize("granularity", [PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()])
def test_launches_of_a_cast_whose_blocks_fit_a_tile(monkeypatch, granularity):
    with launches(monkeypatch) as names:
        quantize_by(X, plan(granularity=granularity), None, 1)
    assert names == ["cast_blocks"]


def test_launches_of_a_cast_of_rows_that_lie_across_memory(monkeypatch):
    with launches(monkeypatch) as names:
        quantize_by(X, plan(granularity=PerRow()), None, 0)
    assert names == ["zeros", "block_tops", "cast_blocks"]


def trained(recipe: Recipe, steps: int) -> Iterator[None]:
    """Train a layer whose weight is remade in backward, and one whose weight is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 1)).to(torch.bfloat16)
    unclamp.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        yield
    (ledger,) = find_ledgers(model)
    assert ledger.updates == steps


RECIPES = {
    "delayed": Recipe.uniform(Delayed()),
    "guarded": Recipe.uniform(Guarded()),
    "dynamic": Recipe.uniform(Dynamic()),
    "dynamic rows": Recipe.uniform(Dynamic(granularity=PerRow())),
    "delayed blocks of a weight": Recipe(weight=Guarded(granularity=PerBlock(1, 128))),
}


@pytest.mark.parametrize("name", RECIPES)
def test_host_asks_nothing_in_a_training_step(monkeypatch, name):
    steps = trained(RECIPES[name], 2)  # the second has scales
    with launches(monkeypatch) as names:
        for _ in steps:
            assert names


def test_host_dispatches_few_operators_in_a_step(monkeypatch):
    """Each takes the host some microseconds, and a layer's step is to take it few hundred.

    Four casts make 15 tensors: codes, some of them turned, statistics, scale and amax.
    """
    layer = nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    model = nn.Sequential(layer)
    unclamp.convert(model, RECIPES["delayed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 32, dtype=torch.bfloat16, requires_grad=True)

    def step() -> Launches:
        optimizer.zero_grad()
        x.grad = None
        with noted(monkeypatch) as mode:
            y = model(x)
            y.backward(torch.ones_like(y))
        optimizer.step()
        return mode

    step()
    mode = step()  # with scales
    assert mode.dispatched <= 55
    assert mode.names.count("cast_tiles") == 4


@pytest.mark.parametrize(("name", "again"), [("delayed", 0), ("guarded", 1), ("dynamic", 1)])
def test_launches_of_a_layer_follow_from_its_scaling(monkeypatch, name, again):
    """Six casts of two layers, and one of the weight that backward casts once more."""
    steps = trained(RECIPES[name], 2)
    counts = []
    with launches(monkeypatch) as names:
        for _ in steps:
            counts.append((names.count("cast_tiles"), names.count("cast_again")))
            names.clear()
    assert counts == [(7, 7), (7, 7 * again)]  # nothing is measured in the first step


def test_launches_of_an_evaluation_before_any_training_know_no_scale(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 16))
    unclamp.convert(model, RECIPES["delayed"])
    with launches(monkeypatch) as names, torch.no_grad():
        model(torch.randn(8, 32))
    assert names.count("cast_again") == 2


# A scale that is 0 although it should have been measured: one program casts, with the same bits.


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("value", ["any", "zeros", "nothing finite", "max", "special"])
def test_alone_a_cast_without_a_scale_is_dynamic(monkeypatch, value, turned):
    x = {
        "any": torch.randn(100, 100, generator=torch.Generator().manual_seed(0)),
        "zeros": torch.zeros(40, 40),
        "nothing finite": torch.full((40, 40), torch.nan),
        "max": torch.full((40, 40), 448.0),  # the tensor's own scale is 1
        "special": torch.tensor([1e-30, 448.0, -0.0, torch.inf, 1e-9] * 8).view(5, 8),
    }[value]
    got = quantize_tensor(x, E4M3FN, torch.tensor(0.0), measured=True, turned=turned)
    want = quantize_plain(x, E4M3FN)
    assert torch.equal(bytes_of(got.codes), bytes_of(want.codes))
    assert torch.equal(got.scale_inv, want.scale_inv)
    assert torch.equal(got.amax, want.amax)
    torch.testing.assert_close(got.stats, want.stats, rtol=1e-5, atol=0)
    assert got.stats[Stat.UNDERFLOWED] == want.stats[Stat.UNDERFLOWED]
    if turned:
        assert got.turned is not None
        assert torch.equal(bytes_of(got.turned), bytes_of(got.codes))


def bytes_of(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("fmt", [E4M3FN], ids=lambda f: f.name)
def test_alone_bits_and_sums_are_those_of_two_launches(fmt: Format):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * 3
    one, two = (
        quantize_tensor(x, fmt, torch.tensor(200.0), measured=measured)
        for measured in (True, False)
    )
    assert torch.equal(bytes_of(one.codes), bytes_of(two.codes))
    assert torch.equal(one.stats, two.stats)
    assert one.stats[Stat.SATURATED] > 0


# Slots are zero again, and no two launches that could run at once share one.


def test_slots_are_zero_after_every_kind_of_cast():
    memory = slots._slots(torch.device("cpu"))._memory
    for scale in (None, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1e9)):
        for settings in ({}, {"guard": True}, {"measured": True}):
            quantize_tensor(torch.randn(3000), E4M3FN, scale, **settings)
            assert not memory.any()
    quantize_by(X, plan(granularity=PerRow()), None, 1)
    assert not memory.any()


def test_slots_of_streams_and_graphs_are_different(monkeypatch):
    monkeypatch.setattr(slots, "SLOTS", 4)
    made = slots.Slots(torch.device("cpu"))
    room, same, other = made.of_stream(7), made.of_stream(7), made.of_stream(8)
    assert room is same
    assert room.scratch.data_ptr() != other.scratch.data_ptr()
    first = room.slot
    each = [first, other.slot, made.fresh(), made.fresh()]
    assert len({slot.data_ptr() for slot in each}) == 4
    assert {slot.data_ptr() % 16 for slot in each} == {made._memory.data_ptr() % 16}
    assert len({slot.untyped_storage().data_ptr() for slot in each}) == 1
    late = made.fresh()  # memory of its own
    assert late.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert late.tolist() == [0, 0, 0, 0]


def test_slots_of_launches_that_are_captured_are_their_own(monkeypatch):
    made = slots.Slots(torch.device("cpu"))
    monkeypatch.setattr(slots, "_slots", lambda device: made)
    monkeypatch.setattr(slots, "_WITH_SLOTS", {0})
    monkeypatch.setattr(slots, "_stream", lambda index: 5)
    monkeypatch.setattr(
        slots, "_scratch", lambda numbers, device: torch.empty(numbers, dtype=torch.float64)
    )
    device, found, rooms = torch.device("cuda", 0), [], []
    for is_capturing in (False, True, True, False):
        monkeypatch.setattr(slots, "is_capturing", lambda now=is_capturing: now)
        found.append(slots.slot_for(device).data_ptr())
        rooms.append(slots.room_for(device, 6))
    assert len(set(found)) == 3
    assert found[0] == found[3]
    assert rooms[0] is rooms[3]
    assert len({room.slot.data_ptr() for room in rooms}) == 3
    assert len({room.scratch.data_ptr() for room in rooms}) == 3
    assert [room.scratch.numel() for room in rooms] == [slots.SCRATCH, 6, 6, slots.SCRATCH]


def test_slots_a_stream_is_asked_of_torch_where_its_number_cannot_be(monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", {3: stream}.__getitem__)
    monkeypatch.setattr(slots, "_raw_stream", None)
    assert slots._stream(3) == 5
    monkeypatch.setattr(slots, "_raw_stream", lambda index: index + 4)
    assert slots._stream(3) == 7


def test_scratch_is_a_launchs_own_where_it_leaves_something_in_it_or_wants_more():
    device = torch.device("cpu")
    shared = slots.room_for(device, slots.SCRATCH)
    assert slots.room_for(device, 6) is shared
    for count, leaves in ((6, True), (slots.SCRATCH + 1, False)):
        own = slots.room_for(device, count, leaves=leaves)
        assert own.slot is shared.slot
        assert own.scratch.data_ptr() != shared.scratch.data_ptr()
        assert own.scratch.numel() == count


@pytest.mark.parametrize("most", [3, 4097])
def test_scratch_of_casts_of_any_number_of_programs(monkeypatch, most):
    """Few programs do many tiles each; more than a stream's scratch holds have their own."""
    monkeypatch.setattr(cast, "INTERPRETED", cast.Tile(1, 16, 16, 1, 0, most))
    x = torch.randn(256 * 5 if most == 3 else 256, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(slots, "SCRATCH", slots.SCRATCH if most == 3 else 5)
    got = quantize_tensor(x, E4M3FN, torch.tensor(50.0), measured=True)
    want = quantize_plain(x, E4M3FN, torch.tensor(50.0))
    assert torch.equal(bytes_of(got.codes), bytes_of(want.codes))
    torch.testing.assert_close(got.stats, want.stats, rtol=1e-5, atol=0)


@pytest.mark.parametrize("guard", [False, True])
def test_a_tile_that_is_loaded_ahead_is_cast_all_the_same(monkeypatch, guard):
    """Tiles are three a program, and the last is not whole."""
    monkeypatch.setattr(cast, "INTERPRETED", cast.Tile(1, 16, 16, 1, 0, 3, ahead=True))
    x = torch.randn(256 * 8 + 33, generator=torch.Generator().manual_seed(4))
    for factor in (50.0, 500.0):
        got = quantize_tensor(x, E4M3FN, torch.tensor(factor), guard=guard)
        want = quantize_plain(x, E4M3FN, torch.tensor(factor), guard=guard)
        assert torch.equal(bytes_of(got.codes), bytes_of(want.codes))
        torch.testing.assert_close(got.stats, want.stats, rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_wild", [False, True])
@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_alone_a_cast_that_shows_what_is_wild_stands_for_nan(scale, is_wild):
    x = torch.tensor([1.0, -3.0, 448.0, torch.inf if is_wild else 0.5])
    got, plain = (
        cast.quantize(x, plan(), torch.tensor(scale), measured=True, shows_wild=shows)
        for shows in (True, False)
    )
    expected = torch.where(plain.stats[Stat.NONFINITE] > 0, torch.nan, plain.scale_inv)
    assert got.shows_wild
    assert not plain.shows_wild
    assert bool(got.scale_inv.isnan()) is is_wild
    assert torch.equal(got.scale_inv.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(bytes_of(got.codes), bytes_of(plain.codes))
    assert torch.equal(got.stats, plain.stats)


def test_slots_of_threads_are_different():
    mine = slots.slot_for(torch.device("cpu"))
    theirs: list[Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(slots.slot_for(torch.device("cpu"))))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
    assert slots.slot_for(torch.device("cpu")) is mine
