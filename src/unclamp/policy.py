"""What a scaling does with a history: from past amaxes to the next scale, and when it re-casts.

One text, which runs on numpy and on torch with the same bits: the ledger trains with it, and a
reader of a log gets from logged amaxes exactly the scales that a training would have made.
`xp` is the module, `numpy` or `torch`, whose arrays are given. No torch is loaded here.

    amax  = reduce(the newest `history_len` amaxes)        the maximum, or a function
    scale = fmt.max / 2**margin / amax                     kept in [2**-126, 2**126]

Beyond these ends scale or 1 / scale would be subnormal, which GPUs may take for 0. Transformer
Engine goes on to the largest float32 (docs/scaling.md, "Tiny tensors").

Where an amax says nothing (0, NaN, Inf) the previous scale stays, and a static scale stays always.

A *power-of-two* scale is the exact quotient rounded down to a power of two. Down, because a
scale that is too large overflows; exact, because a logarithm taken in float32 may round across
a whole number and give the next power. So it is taken from exponents and mantissas:

    largest = L * 2**l, amax = A * 2**a, L and A in [1/2, 1)
    floor(log2(largest / amax)) = l - a - (1 if A > L else 0)
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from unclamp.formats import Format
from unclamp.reference import SCALE_MAX, SCALE_MIN
from unclamp.rule import Operand
from unclamp.scaling import MAX_SCALE_EXPONENT, Delayed, Dynamic, Guarded, Reduce, Scaling

FLOAT32_BIAS = 127
FLOAT32_MANTISSA_BITS = 23
DEFAULT_HISTORY_LEN = Delayed().history_len
"""Updates remembered for sites whose scaling asks for none."""

Array = Any
"""An array of numpy or of torch: what both have in common has no type."""


def window_of(scaling: Scaling) -> int | None:
    """Return how many of the newest amaxes a scaling takes the maximum of.

    None where its amax comes from a function, which has to see them all.
    """
    if _has_function(scaling):
        return None
    return 1 if scaling.reduce == "most_recent" else history_len_of(scaling)


def history_len_of(scaling: Scaling) -> int:
    """Return the updates remembered for a scaling: what it looks back on, or the default."""
    return scaling.history_len or DEFAULT_HISTORY_LEN


def _has_function(scaling: Scaling) -> bool:
    return callable(scaling.reduce) or type(scaling).amax is not Scaling.amax


class History(Protocol):
    """Past amaxes of some scales, however they are kept."""

    def amax(self, window: Array) -> Array:
        """Return the largest of the newest `window[i]` amaxes of each scale, `[scales]`."""
        ...

    def newest(self, rows: Array, length: int) -> Array:
        """Return the newest amaxes of some scales, newest first: `[rows, length]`."""
        ...


@dataclass(frozen=True)
class Table:
    """A history as one array `[scales, updates]`, newest first, 0 where nothing was measured."""

    amaxes: Array
    xp: ModuleType

    def amax(self, window: Array) -> Array:
        """Return the largest of the newest `window[i]` amaxes of each scale."""
        age = self.xp.cumsum(self.xp.ones_like(self.amaxes), 1)
        return self.xp.amax(self.xp.where(age <= window[:, None], self.amaxes, 0), 1)

    def newest(self, rows: Array, length: int) -> Array:
        """Return the newest amaxes of some scales, newest first."""
        return self.amaxes[rows, :length]


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Scales whose amax comes from a function of their history.

    Attributes:
        scaling: Whose `amax` it is.
        rows: Which scales.
    """

    scaling: Scaling
    rows: Array


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What scalings and formats come to, in columns: one value a scale.

    Attributes:
        largest: Where the amax is to land, `fmt.max / 2**margin`, float32.
        window: Newest amaxes whose maximum counts, int64.
        power_of_two: Which scales are powers of two; a bool where all or none are.
        is_static: Which scales never change, and `static` what they are; None where none is.
        static: As above, float32.
        takes_own: Which scales are the tensor's own, or of no cast at all.
        is_ageless: Which scales come from no amax in particular.
        reductions: Scales whose amax is not the maximum of their window.
    """

    largest: Array
    window: Array
    power_of_two: Array | bool
    is_static: Array | None
    static: Array
    takes_own: Array
    is_ageless: Array
    reductions: tuple[Reduction, ...]

    @classmethod
    def of(cls, operands: Sequence[Operand], counts: Sequence[int] | None = None) -> "Settings":
        """Return the columns of operands, of which each has `counts[i]` scales, as numpy arrays."""
        scalings = [operand.scaling for operand in operands]
        repeats = np.ones(len(scalings), np.int64) if counts is None else np.asarray(counts)

        def column(values: Iterable[float | bool], dtype: type[np.generic]) -> np.ndarray:
            return np.repeat(np.array(list(values), dtype=dtype), repeats.astype(np.int64))

        fixed = [scaling.fixed_scale for scaling in scalings]
        powers = column((s.power_of_two or s.granularity.power_of_two for s in scalings), np.bool_)
        is_static = column((scale is not None for scale in fixed), np.bool_)
        return cls(
            largest=column(map(_largest, operands), np.float32),
            window=column((window_of(s) or history_len_of(s) for s in scalings), np.int64),
            power_of_two=bool(powers.any()) if powers.all() or not powers.any() else powers,
            is_static=is_static if is_static.any() else None,
            static=column((scale or 0.0 for scale in fixed), np.float32),
            takes_own=column((s.takes_own or not s.casts for s in scalings), np.bool_),
            is_ageless=column(
                (s.fixed_scale is not None or _has_function(s) for s in scalings), np.bool_
            ),
            reductions=_reductions(scalings, repeats.tolist()),
        )

    def mapped(self, convert: Callable[[np.ndarray], Array]) -> "Settings":
        """Return the settings with each column converted, to a tensor on a device for example."""
        powers, static = self.power_of_two, self.is_static
        return replace(
            self,
            largest=convert(self.largest),
            window=convert(self.window),
            power_of_two=powers if isinstance(powers, bool) else convert(powers),
            is_static=None if static is None else convert(static),
            static=convert(self.static),
            takes_own=convert(self.takes_own),
            is_ageless=convert(self.is_ageless),
            reductions=tuple(replace(r, rows=convert(r.rows)) for r in self.reductions),
        )


def _largest(operand: Operand) -> float:
    return math.ldexp(operand.format.max, -operand.scaling.margin)


def _reductions(scalings: Sequence[Scaling], counts: Sequence[int]) -> tuple[Reduction, ...]:
    groups: list[tuple[Scaling, list[int]]] = []  # a user's function need not be hashable
    row = 0
    for scaling, count in zip(scalings, counts, strict=True):
        if _has_function(scaling):
            rows = next((found for other, found in groups if other == scaling), None)
            if rows is None:
                groups.append((scaling, rows := []))
            rows.extend(range(row, row + count))
        row += count
    return tuple(
        Reduction(scaling=scaling, rows=np.array(rows, np.int64)) for scaling, rows in groups
    )


def next_scales(history: History, settings: Settings, previous: Array, *, xp: ModuleType) -> Array:
    """Return the scales that follow from histories, float32 `[scales]`.

    Args:
        history: Past amaxes; `Table` where they are an array.
        settings: What each scale's scaling and format come to.
        previous: The scales so far: what stays where a history says nothing.
        xp: `numpy` or `torch`.

    Numerics: 0 in `previous` means that nothing was measured yet. Equal, bit for bit, on numpy
    and torch and to `unclamp.reference.scale_from_amax`; functions of a user's own aside.
    """
    amax = history.amax(settings.window)
    for each in settings.reductions:
        past = history.newest(each.rows, history_len_of(each.scaling))
        amax[each.rows] = xp.asarray(each.scaling.amax(past, xp), dtype=amax.dtype)
    with np.errstate(all="ignore") if xp is np else contextlib.nullcontext():
        scales = scale_for(
            amax, settings.largest, power_of_two=settings.power_of_two, previous=previous, xp=xp
        )
    if settings.is_static is None:
        return scales
    return xp.where(settings.is_static, settings.static, scales)


def scale_for(
    amax: Array,
    largest: Array | float,
    *,
    power_of_two: Array | bool,
    previous: Array | float,
    xp: ModuleType,
) -> Array:
    """Return the scales that bring float32 amaxes to `largest`; see the module's equations.

    Numbers stay numbers: as tensors they would be copied to the device, which waits.
    """
    known = (amax > 0) & (amax < math.inf)
    if power_of_two is True:
        scale = _floor_power_of_two(largest, amax, xp)
    else:
        # number / tensor would multiply by a reciprocal, and round twice.
        target = xp.full_like(amax, largest) if isinstance(largest, int | float) else largest
        scale = xp.clip(target / amax, SCALE_MIN, SCALE_MAX)
        if power_of_two is not False:
            scale = xp.where(power_of_two, _floor_power_of_two(largest, amax, xp), scale)
    return xp.where(known, scale, previous)


def _floor_power_of_two(largest: Array | float, amax: Array, xp: ModuleType) -> Array:
    frexp = math.frexp if isinstance(largest, int | float) else xp.frexp
    top_mantissa, top_exponent = frexp(largest)
    mantissa, exponent = xp.frexp(amax)
    power = top_exponent - exponent
    power = xp.where(mantissa > top_mantissa, power - 1, power)
    power = xp.clip(power, -MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT)
    # From bits: exp2 need not be exact everywhere.
    return ((power + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS).view(xp.float32)


def overflows(amax: Array, scale: Array, fmt: Format) -> Array:
    """Whether a cast with this scale would clamp the element that the amax is of.

    What a guarded cast decides by, on arrays of numpy or torch; float32, as the cast multiplies.
    A scale of 0 ("nothing measured yet") clamps nothing: the cast then takes the tensor's own.
    """
    return amax * scale > fmt.overflow_limit


def unclamped(scaling: Scaling) -> Scaling | None:
    """Return the scaling that differs only where this one would clamp; None if it cannot clamp.

    It is the guarded twin with the same history, reduction and margin. A static scale has no
    history, and becomes dynamic.
    """
    if not scaling.clamps:
        return None
    if scaling.history_len is None:
        return Dynamic()
    return Guarded(
        history_len=scaling.history_len,
        reduce=_reduce_of(scaling),
        margin=scaling.margin,
        power_of_two=scaling.power_of_two,
        granularity=scaling.granularity,
    )


def _reduce_of(scaling: Scaling) -> Reduce:
    return scaling.reduce if type(scaling).amax is Scaling.amax else AmaxOf(scaling)


@dataclass(frozen=True)
class AmaxOf:
    """The amax of one scaling, as the reduce function of another."""

    scaling: Scaling

    @property
    def __name__(self) -> str:
        """Its name where a log writes down a reduce function."""
        return f"the amax of {self.scaling.kind}"

    def __call__(self, history: Array) -> Array:  # noqa: D102
        # A history that is no array of numpy is one of torch, which is loaded then.
        xp = np if isinstance(history, np.ndarray) else sys.modules["torch"]
        return self.scaling.amax(history, xp)
