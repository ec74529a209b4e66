"""How the last program of a launch to finish adds up what all of them found, in a fixed order.

Each writes its findings, and counts itself. Findings are read past the cache of a multiprocessor.
"""

# Kernels are Triton's language, of which pyright sees Python's.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from unclamp.numerics.gpu.rounding import as_float, own_scale
from unclamp.numerics.stats import Stat

AMAX = tl.constexpr(int(Stat.AMAX))
SCALE_INV = tl.constexpr(int(Stat.SCALE_INV))
ELEMENTS = tl.constexpr(int(Stat.ELEMENTS))
SATURATED = tl.constexpr(int(Stat.SATURATED))
UNDERFLOWED = tl.constexpr(int(Stat.UNDERFLOWED))
NONFINITE = tl.constexpr(int(Stat.NONFINITE))
RECAST = tl.constexpr(int(Stat.RECAST))
SQUARE = tl.constexpr(int(Stat.SQUARE))
SATURATED_SQUARE = tl.constexpr(int(Stat.SATURATED_SQUARE))
CASTS = tl.constexpr(int(Stat.CASTS))
COUNTER, FLAG = tl.constexpr(0), tl.constexpr(1)
"""Where in a slot programs count themselves, and where they say that a guarded cast overflows."""
PARTS = 5
"""Sums of a program, float64 `[PARTS, programs]`: the three counts, then the two squares."""


@triton.jit
def is_last(slot, programs):
    """Count a program whose findings are written; return whether all others are counted.

    Its counter is 0 again then.
    """
    tl.debug_barrier()
    counted = tl.atomic_add(slot + COUNTER, 1, sem="acq_rel")
    tl.debug_barrier()
    found = counted == programs - 1
    if found:
        tl.store(slot + COUNTER, programs * 0)
    return found


@triton.jit
def largest_of(tops, programs, SIZE: tl.constexpr):
    """Return the largest of what programs found, `SIZE` of them at a time."""
    each = tl.arange(0, SIZE)
    most = tl.zeros([SIZE], tl.int32)
    start = programs * 0
    while start < programs:
        mask = start + each < programs
        found = tl.load(tops + start + each, mask=mask, other=0, cache_modifier=".cg")
        most = tl.maximum(most, found)
        start += SIZE
    return tl.max(most)


@triton.jit
def add_up(parts, stats, scale_inv, amax, top, inv, programs, elements, passes, is_own,
           casts_again, SHOWS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Write the statistics of a cast, in a fixed order; see `PARTS`.

    With `SHOWS` NaN takes the place of `scale_inv` where an element is not finite.
    By its own scale (`is_own`) it saturates nothing; what vanishes is counted when it is made.
    """
    each = tl.arange(0, SIZE)
    saturated = tl.zeros([SIZE], tl.float64)
    underflowed = tl.zeros([SIZE], tl.float64)
    nonfinite = tl.zeros([SIZE], tl.float64)
    square = tl.zeros([SIZE], tl.float64)
    removed = tl.zeros([SIZE], tl.float64)
    start = programs * 0
    while start < programs:
        here = parts + start + each
        mask = start + each < programs
        saturated += tl.load(here, mask=mask, other=0.0, cache_modifier=".cg")
        underflowed += tl.load(here + programs, mask=mask, other=0.0, cache_modifier=".cg")
        nonfinite += tl.load(here + 2 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        square += tl.load(here + 3 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        removed += tl.load(here + 4 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        start += SIZE
    wild = tl.sum(nonfinite)
    nothing = wild * 0
    largest = as_float(tl.where(wild < elements, top, -0x40800000))  # bits of -1
    shown = inv
    if SHOWS:
        shown = tl.where(wild > 0, float("nan"), inv)
    tl.store(scale_inv, shown)
    tl.store(amax, largest)
    tl.store(stats + AMAX, largest.to(tl.float64))
    tl.store(stats + SCALE_INV, inv.to(tl.float64))
    tl.store(stats + ELEMENTS, nothing + elements)
    tl.store(stats + SATURATED, tl.where(is_own, nothing, tl.sum(saturated)))
    tl.store(stats + NONFINITE, wild)
    tl.store(stats + RECAST, tl.where(passes, nothing + 1, nothing))
    tl.store(stats + SQUARE, tl.sum(square))
    tl.store(stats + SATURATED_SQUARE, tl.where(is_own, nothing, tl.sum(removed)))
    tl.store(stats + CASTS, nothing + 1)
    tl.store(stats + UNDERFLOWED, tl.where(casts_again, nothing, tl.sum(underflowed)))


@triton.jit
def settled(tops, parts, stats, scale_inv, amax, given, programs, elements, F: tl.constexpr,
            GUARD: tl.constexpr, ALONE: tl.constexpr, SHOWS: tl.constexpr,
            SIZE: tl.constexpr):  # fmt: skip
    """Write what a cast has seen; return the scale to cast again with, 0 where that is not due."""
    top = largest_of(tops, programs, SIZE)
    passes = programs < 0
    if GUARD:
        passes = as_float(top) * given > F.limit
    is_own = passes | ((given > 0) == 0)  # NaN too
    used = tl.where(is_own, own_scale(top, F), given)
    casts_again = is_own
    if ALONE:
        casts_again = is_own & (used != 1.0)
    inv = tl.div_rn(used * 0 + 1.0, used)
    add_up(parts, stats, scale_inv, amax, top, inv, programs, elements, passes, is_own,
           casts_again, SHOWS, SIZE)  # fmt: skip
    return tl.where(casts_again, used, 0.0)
