"""A closer look at a cast: its error, the exponents of its tensor, and which codes it used.

Costs a pass of its own, and is made only where somebody asked for it. The result is one float64
vector, so that it travels and adds up as the statistics do (`stats`):

    INSPECTED              casts in this vector
    INSPECTED_SQUARE       sum of x**2 over finite x
    ERROR_SQUARE           sum of (x - dequantised)**2 over finite x
    EXPONENTS              elements by floor(log2 |x|), finite and non-zero
    MAGNITUDES             finite elements by the code of their magnitude
    ROW_SQNR               rows by their own signal over error, in steps of half a decibel
    QUARTERS               elements by quarter of an octave, the two bits of mantissa after the 1.,
                           from 2**-64 up to 2**64
    RESTS                  sum over the elements of each quarter of their other 21 bits of mantissa:
                           how far above its lower edge they lie, together
    GRADIENTS and after    what clamping did to a weight's gradient (`gradient`)
    PRICES and after       what the cast changed of the loss (`price`)

A row is what lies along the last axis: a token of an input or gradient, an output feature of a
weight. One huge element decides the ratio of the whole tensor, and that of its own row only.

Counts and rests are sums of whole numbers: exact, and the same in any order.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.numerics.cast import dequantize_codes, is_memory
from unclamp.numerics.fused import fused
from unclamp.scaling import Granularity

INSPECTED, INSPECTED_SQUARE, ERROR_SQUARE = range(3)
LOWEST_EXPONENT = -149
"""That of the smallest float32."""
SUBNORMAL_EXPONENTS = 23
"""Exponents that only subnormals have."""
EXPONENTS = slice(3, 3 + 128 - LOWEST_EXPONENT)
MAGNITUDES = slice(EXPONENTS.stop, EXPONENTS.stop + 128)
A_DECIBEL = 2
"""Bins of `ROW_SQNR` a decibel; each is centred on a multiple of half a decibel."""
LOWEST_ROW_DB, HIGHEST_ROW_DB = -20, 80
"""Rows beyond these count as these; an exact row has a bin of its own, the last."""
ROW_BINS = (HIGHEST_ROW_DB - LOWEST_ROW_DB) * A_DECIBEL + 2
ROW_SQNR = slice(MAGNITUDES.stop, MAGNITUDES.stop + ROW_BINS)
QUARTER_BITS = 2
REST_BITS = 23 - QUARTER_BITS
LOWEST_QUARTER_EXPONENT, HIGHEST_QUARTER_EXPONENT = -64, 63
"""Quarters are counted of the octaves in between. All of a float32's would double the vector, of
which a ledger has one a site, and no training's tensor has its largest element beyond."""
QUARTER_BINS = (HIGHEST_QUARTER_EXPONENT - LOWEST_QUARTER_EXPONENT + 1) << QUARTER_BITS
QUARTERS = slice(ROW_SQNR.stop, ROW_SQNR.stop + QUARTER_BINS)
RESTS = slice(QUARTERS.stop, QUARTERS.stop + QUARTER_BINS)
GRADIENTS, GRADIENT_SQUARE, CHANGE_SQUARE, CHANGE_PRODUCT = range(RESTS.stop, RESTS.stop + 4)
"""0 in the look at a cast itself."""
PRICES, CLAMP_PRICE, ROUNDINGS, ROUNDING_PRICE = range(CHANGE_PRODUCT + 1, CHANGE_PRODUCT + 5)
"""Last of all, and 0 likewise."""
DETAILS = ROUNDING_PRICE + 1
"""Length of the vector."""


def inspect(
    x: Tensor,
    codes: Tensor,
    scale_inv: Tensor,
    *,
    granularity: Granularity,
    axis: int = -1,
    values: Tensor | None = None,
) -> Tensor:
    """Return the vector of a cast, float64 `[DETAILS]`.

    Args:
        x: The tensor that was cast.
        codes: Its codes, in its shape.
        scale_inv: As in `Quantized`.
        granularity: As in `Quantized`.
        axis: As in `Quantized`.
        values: What the codes decode to, where that is at hand.

    Numerics: NaN and Inf are left out; an empty tensor counts as a cast with nothing in it.
    """
    x = x.detach()
    if values is None:
        values = dequantize_codes(codes, scale_inv, granularity=granularity, axis=axis)
    if is_memory(x) and x.dtype != torch.float64 and x.numel() and fused():
        return _fused(x, codes, values)
    return inspect_plain(x, codes, values)


def inspect_plain(x: Tensor, codes: Tensor, values: Tensor) -> Tensor:
    """Return the vector of a cast with torch's own operations, on any device, without a sync."""
    width = x.shape[-1] if x.ndim else 1
    x = x.detach().to(torch.float32).reshape(-1)
    finite = x.isfinite()
    kept = torch.where(finite, x, 0)
    wide = kept.double()
    error = torch.where(finite, wide - values.reshape(-1).double(), 0)
    magnitudes = (codes.contiguous().view(torch.uint8).reshape(-1) & 0x7F).to(torch.int64)
    details = torch.zeros(DETAILS, dtype=torch.float64, device=x.device)
    details[INSPECTED] = 1
    details[INSPECTED_SQUARE] = wide.square_().sum()
    details[ERROR_SQUARE] = error.square_().sum()
    if width:
        details[ROW_SQNR] = _rows(wide.reshape(-1, width).sum(1), error.reshape(-1, width).sum(1))
    details[EXPONENTS], details[QUARTERS], details[RESTS] = _octaves(kept)
    details[MAGNITUDES] = _counts(magnitudes, finite, MAGNITUDES)
    return details


def _octaves(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return elements by exponent, by quarter of an octave, and each quarter's rests of mantissa.

    One count serves both: of subnormals by exponent, of all others by quarter.
    """
    size = kept.view(torch.int32) & 0x7FFFFFFF
    is_normal = size >= 1 << 23
    quarter = (size >> REST_BITS) - (1 << QUARTER_BITS) + SUBNORMAL_EXPONENTS
    place = torch.where(is_normal, quarter, torch.frexp(kept).exponent - 1 - LOWEST_EXPONENT)
    place = torch.where(size > 0, place, 0).to(torch.int64)
    rest = torch.where(is_normal, size & ((1 << REST_BITS) - 1), 0).to(torch.int64)
    empty = torch.zeros(
        SUBNORMAL_EXPONENTS + (254 << QUARTER_BITS), dtype=torch.int64, device=kept.device
    )
    counts = empty.scatter_add(0, place, (size > 0).to(torch.int64))
    rests = empty.scatter_add_(0, place, rest)
    octaves = counts[SUBNORMAL_EXPONENTS:].view(-1, 1 << QUARTER_BITS).sum(1)
    first = SUBNORMAL_EXPONENTS + ((LOWEST_QUARTER_EXPONENT + 126) << QUARTER_BITS)
    quarters = slice(first, first + QUARTER_BINS)
    exponents = torch.cat([counts[:SUBNORMAL_EXPONENTS], octaves])
    return exponents, counts[quarters], rests[quarters]


def _rows(signal: Tensor, noise: Tensor) -> Tensor:
    """Count rows by the ratio of their sums of squares; those without a signal are left out."""
    place = torch.round(10 * A_DECIBEL * torch.log10(signal / noise)) - LOWEST_ROW_DB * A_DECIBEL
    place = torch.where(noise > 0, place.clamp(0, ROW_BINS - 2), ROW_BINS - 1)
    return _counts(place.nan_to_num().to(torch.int64), signal > 0, ROW_SQNR)


def _counts(bins: Tensor, wanted: Tensor, place: slice) -> Tensor:
    """Count the wanted elements by bin; `bincount` would look at the device's data."""
    counts = torch.zeros(place.stop - place.start, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, torch.where(wanted, bins, 0), wanted.to(torch.int64))


def _fused(x: Tensor, codes: Tensor, values: Tensor) -> Tensor:
    cpu = fused()
    x, values = x.resolve_neg().contiguous(), values.contiguous()
    seen = cpu.look(
        x, codes.contiguous(), values,
        a_decibel=A_DECIBEL, lowest=LOWEST_ROW_DB * A_DECIBEL, bins=ROW_BINS,
    )  # fmt: skip
    details = np.zeros(DETAILS)
    details[INSPECTED] = 1
    details[INSPECTED_SQUARE], details[ERROR_SQUARE] = seen.sums
    details[EXPONENTS], details[MAGNITUDES] = seen.exponents, seen.magnitudes
    details[ROW_SQNR] = seen.ratios
    first = (127 + LOWEST_QUARTER_EXPONENT) << QUARTER_BITS
    details[QUARTERS], details[RESTS] = seen.quarters[first : first + QUARTER_BINS].T
    return torch.from_numpy(details)


def empty_details(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the neutral element of adding, float64 `[rows, DETAILS]`."""
    return torch.zeros(rows, DETAILS, dtype=torch.float64, device=device)


def row_median_db(rows: np.ndarray) -> float | None:
    """Return the median ratio of signal to error over rows, decibel, to a quarter of one.

    Args:
        rows: How many rows have which, `[ROW_BINS]`.

    Numerics: of an even number of rows the lower of the two in the middle; Inf where that row is
    exact, None where no row had a non-zero element.
    """
    total = int(rows.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(rows), (total + 1) // 2))
    return math.inf if place == ROW_BINS - 1 else place / A_DECIBEL + LOWEST_ROW_DB


def range_used(magnitudes: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the share of the format's powers of two that codes lie in, `[...]`.

    Args:
        magnitudes: Elements by the code of their magnitude, `[..., 128]`.
        fmt: Their format.
    """
    return np.mean(magnitudes @ _binades(fmt) > 0, axis=-1)


@cache
def _binades(fmt: Format) -> np.ndarray:
    """Return which magnitude lies in which of the format's powers of two, 0 or 1 `[128, n]`."""
    values = np.array([fmt.decode(code) for code in range(128)])
    counts = np.isfinite(values) & (values > 0)
    exponents = np.floor(np.log2(np.where(counts, values, 1)))
    return (exponents[:, None] == np.unique(exponents[counts])) & counts[:, None]
