"""One rule from history to scale: numpy, torch and plain Python give the same bits."""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclamp import policy
from unclamp.formats import E4M3FN, FORMATS, Format
from unclamp.numerics import scale_from_amax
from unclamp.policy import Settings, Table, next_scales, overflows, unclamped
from unclamp.reference import is_saturated
from unclamp.reference import scale_from_amax as reference
from unclamp.rule import Operand
from unclamp.scaling import (
    MX,
    SCALINGS,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Scaling,
    Static,
)

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
BITS = np.append(np.arange(0x7F81, dtype=np.uint32), np.uint32(0x7FC0)) << 16
BF16 = BITS.view(np.float32)
"""Every bf16 number from 0 to Inf, and NaN."""


def both(
    history: np.ndarray,
    operands: list[Operand],
    previous: np.ndarray,
    counts: list[int] | None = None,
) -> np.ndarray:
    """Return the next scales by numpy, after a look that those by torch are the same bits."""
    settings = Settings.of(operands, counts)
    got = next_scales(Table(history, np), settings, previous, xp=np)
    tensors = settings.mapped(torch.from_numpy)
    table = Table(torch.from_numpy(history.copy()), torch)
    other = next_scales(table, tensors, torch.from_numpy(previous), xp=torch)
    assert got.dtype == np.float32
    assert np.array_equal(got.view(np.int32), other.numpy().view(np.int32))
    return got


@pytest.mark.parametrize("power_of_two", [False, True])
@every_format
def test_every_bf16_amax_gives_the_same_scale_everywhere(fmt: Format, power_of_two: bool) -> None:
    history = BF16.reshape(-1, 1)
    previous = np.full(len(history), 3.5, np.float32)
    for margin in range(65):
        scaling = Delayed(history_len=1, margin=margin, power_of_two=power_of_two)
        operand = Operand(format=fmt, scaling=scaling)
        got = both(history, [operand], previous, [len(history)])
        public = scale_from_amax(
            torch.from_numpy(BF16.copy()),
            fmt.max,
            margin=margin,
            power_of_two=power_of_two,
            previous=torch.tensor(3.5),
        )
        assert np.array_equal(got, public.numpy())
        if margin in (0, 7, 64):
            expected = [
                reference(a, fmt, margin=margin, power_of_two=power_of_two, previous=3.5)
                for a in BF16.astype(np.float64).tolist()
            ]
            assert got.astype(np.float64).tolist() == expected


amaxes = st.floats(0, 2.0**127, width=32) | st.just(0.0)
common: dict[str, Any] = {"margin": st.integers(0, 64), "power_of_two": st.booleans()}
lengths = st.integers(1, 7)
reductions = st.sampled_from(["max", "most_recent"])
scalings = (
    st.builds(Delayed, **common, history_len=lengths, reduce=reductions)
    | st.builds(Guarded, **common, history_len=lengths, reduce=reductions)
    | st.builds(Dynamic, **common)
    | st.builds(Dynamic, **common, granularity=st.just(MX()))
    | st.builds(Static, scale=st.floats(2.0**-126, 2.0**126, width=32))
    | st.just(HighPrecision())
)


def by_hand(past: list[float], operand: Operand, previous: float) -> float:
    """Return the next scale of one site, one number at a time."""
    scaling = operand.scaling
    if isinstance(scaling, Static):
        return scaling.scale
    if isinstance(scaling, HighPrecision):
        return reference(max(past[:16]), operand.format, previous=previous)
    window = 16
    if isinstance(scaling, Delayed | Guarded):
        window = 1 if scaling.reduce == "most_recent" else scaling.history_len
    assert isinstance(scaling, Delayed | Guarded | Dynamic)
    power = scaling.power_of_two or scaling.granularity == MX()
    return reference(
        max(past[:window]),
        operand.format,
        margin=scaling.margin,
        power_of_two=power,
        previous=previous,
    )


@given(data=st.data())
def test_any_history_gives_what_plain_python_gives(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    columns = data.draw(st.integers(1, 20))
    table = data.draw(
        st.lists(st.lists(amaxes, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
    formats = st.sampled_from(list(FORMATS.values()))
    operands = [
        Operand(format=data.draw(formats), scaling=data.draw(scalings)) for _ in range(rows)
    ]
    before = data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.5]), min_size=rows, max_size=rows))
    got = both(np.array(table, np.float32), operands, np.array(before, np.float32))
    expected = [by_hand(*row) for row in zip(table, operands, before, strict=True)]
    assert got.astype(np.float64).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_where_a_function_says_nothing_the_scale_stays(bad: float) -> None:
    scaling = Delayed(reduce=lambda history: history[:, 0] * 0 + bad)
    operands = [Operand(format=E4M3FN, scaling=scaling), Operand(format=E4M3FN, scaling=Delayed())]
    got = both(np.ones((2, 16), np.float32), operands, np.array([3.5, 3.5], np.float32))
    assert got.tolist() == [3.5, 448]


def test_scales_of_blocks_follow_their_site() -> None:
    operands = [
        Operand(format=E4M3FN, scaling=Delayed(granularity=PerRow())),
        Operand(format=E4M3FN, scaling=Static(scale=2.0)),
        Operand(format=E4M3FN, scaling=Delayed(reduce=lambda history: history[:, 0] * 4)),
    ]
    settings = Settings.of(operands, [3, 1, 2])
    history = np.array([[1], [2], [4], [8], [16], [32]], np.float32)
    got = next_scales(Table(history, np), settings, np.zeros(6, np.float32), xp=np)
    assert got.tolist() == [448, 224, 112, 2, 7, 3.5]


def test_without_sites_there_are_no_scales() -> None:
    got = next_scales(
        Table(np.zeros((0, 4), np.float32), np), Settings.of([]), np.zeros(0, np.float32), xp=np
    )
    assert got.shape == (0,)


@every_format
def test_the_guard_decides_as_a_cast_clamps(fmt: Format) -> None:
    finite = BF16[np.isfinite(BF16)]
    near = np.float32(fmt.overflow_limit)
    amax = np.concatenate([finite, [near, np.nextafter(near, np.float32(np.inf))]])
    for scale in (1.0, 3.7, 2.0**-20):
        with np.errstate(over="ignore"):
            scaled = (amax * np.float32(scale)).astype(np.float64)
            got = overflows(amax, np.float32(scale), fmt)
        # What overflows float32 itself is clamped as well; the scalar sees an Inf there.
        expected = [math.isinf(value) or is_saturated(value, fmt) for value in scaled.tolist()]
        assert got.tolist() == expected
        other = overflows(torch.from_numpy(amax), torch.tensor(scale), fmt)
        assert other.tolist() == expected
    assert not overflows(np.float32(3e38), np.float32(0), fmt)


# ---- what a kind says of itself ------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "casts", "own", "guards", "clamps", "length"),
    [
        (Dynamic(), True, True, False, False, None),
        (Delayed(history_len=3), True, False, False, True, 3),
        (Guarded(), True, False, True, False, 2),
        (Static(scale=1.0), True, False, False, True, None),
        (HighPrecision(), False, False, False, False, None),
    ],
)
def test_the_facts_of_each_kind(
    scaling: Scaling, casts: bool, own: bool, guards: bool, clamps: bool, length: int | None
) -> None:
    assert (scaling.casts, scaling.takes_own, scaling.guards) == (casts, own, guards)
    assert (scaling.clamps, scaling.history_len) == (clamps, length)
    assert scaling.remembers is (length is not None)


@pytest.mark.parametrize(
    ("granularity", "whole", "square", "power"),
    [
        (PerTensor(), True, True, False),
        (PerRow(), False, False, False),
        (PerBlock(128, 128), False, True, False),
        (PerBlock(1, 128), False, False, False),
        (MX(), False, False, True),
    ],
)
def test_the_facts_of_each_granularity(granularity, whole, square, power) -> None:
    facts = (granularity.is_whole, granularity.is_square, granularity.power_of_two)
    assert facts == (whole, square, power)


def test_facts_that_are_no_settings_stay_out_of_text_and_files() -> None:
    assert repr(HighPrecision()) == "HighPrecision()"
    assert repr(Static(scale=2.0)) == "Static(scale=2.0)"
    with pytest.raises(TypeError, match="history_len"):
        Dynamic(history_len=3)  # pyright: ignore[reportCallIssue]


def test_the_twin_that_does_not_clamp_keeps_history_reduction_and_margin() -> None:
    settings: dict[str, Any] = {
        "history_len": 3,
        "reduce": "most_recent",
        "margin": 2,
        "power_of_two": True,
    }
    assert unclamped(Delayed(**settings)) == Guarded(**settings)
    assert unclamped(Static(scale=3.0)) == Dynamic()
    assert [unclamped(s) for s in (Dynamic(), Guarded(), HighPrecision())] == [None] * 3


@dataclass(frozen=True, kw_only=True)
class Doubled(Scaling):
    """Scales for twice the largest amax of two updates."""

    kind: ClassVar[str] = "doubled"
    history_len: int = 2

    def amax(self, history: Any, xp: ModuleType) -> Any:
        return 2 * xp.amax(history, 1)


def test_the_twin_of_a_kind_of_ones_own_asks_that_kind_for_its_amax() -> None:
    twin = unclamped(Doubled())
    assert twin is not None
    assert (twin.kind, twin.history_len) == ("guarded", 2)
    assert twin == unclamped(Doubled())
    history = np.array([[1, 4, 100]], np.float32)
    operands = [Operand(format=E4M3FN, scaling=s) for s in (Doubled(), twin)]
    zeros = np.zeros(2, np.float32)
    assert both(history.repeat(2, 0), operands, zeros).tolist() == [56, 56]
    assert getattr(twin.reduce, "__name__", "") == "the amax of doubled"


def test_only_maxima_are_read_without_the_whole_history() -> None:
    assert policy.window_of(Delayed(history_len=9)) == 9
    assert policy.window_of(Delayed(history_len=9, reduce="most_recent")) == 1
    assert policy.window_of(Dynamic()) == 16
    assert policy.window_of(Doubled()) is None
    assert policy.window_of(Delayed(reduce=lambda history: history[:, 0])) is None


def test_deriving_registers_a_kind_once() -> None:
    from unclamp.errors import RecipeError

    assert SCALINGS["doubled"] is Doubled
    with pytest.raises(RecipeError, match=r"kind 'delayed'.*unclamp\.scaling\.Delayed.*another"):
        type("Mine", (Scaling,), {"kind": "delayed"})
    with pytest.raises(RecipeError, match="a kind of its own for the scaling Mine"):
        type("Mine", (Delayed,), {})
    with pytest.raises(RecipeError, match="a kind of its own"):
        type("Mine", (Scaling,), {"kind": "two words"})
    assert SCALINGS["delayed"] is Delayed
    assert "Mine" not in {cls.__name__ for cls in SCALINGS.values()}


def test_a_class_that_is_made_again_takes_its_own_place() -> None:
    made = [
        type("Again", (Scaling,), {"kind": "again", "__module__": "notebook"}) for _ in range(2)
    ]
    assert SCALINGS.pop("again") is made[1]


@pytest.mark.parametrize(
    "settings",
    [{"history_len": 0}, {"margin": -1}, {"power_of_two": 1}, {"reduce": "mean"},
     {"granularity": "row"}],
)  # fmt: skip
def test_the_settings_of_any_kind_are_checked(settings: dict[str, Any]) -> None:
    from unclamp.errors import RecipeError

    with pytest.raises(RecipeError):
        Delayed(**settings)
