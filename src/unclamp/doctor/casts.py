"""What a plain `.to(float8)` does on a device, and what it does after an explicit clamp.

One cast of all 65,536 bfloat16 values answers every question: overflow, Inf, NaN and the exact
ties are all among them. Codes are decoded here and not on the device, so that a wrong cast
cannot be hidden by an equally wrong way back. Values and cast
are those of the trap `plain-cast`.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.reference import round_to_format
from unclamp.traps.answers import one_line
from unclamp.traps.casts import codes_of, every_bfloat16

SATURATES = "saturates"
GIVES_INF = "gives Inf"
GIVES_NAN = "gives NaN"
MIXED = "gives mixed values"
NOT_SUPPORTED = "not supported"
SOURCES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class CastAnswer:
    """What casts from `source` to `format` do with the 65,536 bfloat16 values.

    Attributes:
        finite_overflow: Fate of finite values beyond the format's overflow limit.
        inf: Fate of +-Inf.
        nan: Fate of NaN.
        ties: Where a value halfway between two codes goes.
        nonfinite: How many of the 65,280 finite inputs become Inf or NaN.
        clamped_differ: How many of them, clamped first, get another code than the reference's.
        error: What the cast raised; the counts are then None.
    """

    format: str
    source: str
    finite_overflow: str = NOT_SUPPORTED
    inf: str = NOT_SUPPORTED
    nan: str = NOT_SUPPORTED
    ties: str = NOT_SUPPORTED
    nonfinite: int | None = None
    clamped_differ: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def probe_cast(fmt: Format, source: torch.dtype, device: str) -> CastAnswer:
    """Cast every bfloat16 value, held in `source`, as it is and clamped to +-max."""
    source_name = str(source).removeprefix("torch.")
    try:
        x = every_bfloat16().to(source)
        plain = codes_of(x, fmt, device).long()
        clamped = codes_of(x.to(device).clamp(-fmt.max, fmt.max), fmt, device).long()
    except Exception as error:
        return CastAnswer(format=fmt.name, source=source_name, error=one_line(error))
    x = every_bfloat16().float()
    finite = x.isfinite()
    values = torch.tensor([fmt.decode(code) for code in range(256)])[plain]
    return CastAnswer(
        format=fmt.name,
        source=source_name,
        finite_overflow=fate(values, x, finite & (x.abs() > fmt.overflow_limit), fmt),
        inf=fate(values, x, x.isinf(), fmt),
        nan=fate(values, x, x.isnan(), fmt),
        ties=fate_of_ties(values, fmt),
        nonfinite=int((finite & ~values.isfinite()).sum()),
        clamped_differ=int((finite & (clamped != reference_codes(fmt))).sum()),
    )


@cache
def reference_codes(fmt: Format) -> Tensor:
    """Return the saturating reference's code of each bfloat16 value, -1 for NaN."""
    # The key is text because -0.0 == 0.0, and they are two codes in two of the formats.
    code_of = {repr(fmt.decode(code)): code for code in range(256) if code not in fmt.nan_codes}
    values = every_bfloat16().tolist()
    return torch.tensor([code_of.get(repr(round_to_format(v, fmt)), -1) for v in values])


def fate(values: Tensor, x: Tensor, chosen: Tensor, fmt: Format) -> str:
    """Say what became of the chosen elements of `x`."""
    got, sign = values[chosen], x[chosen].sign()
    if bool(got.isnan().all()):
        return GIVES_NAN
    if bool((got == sign * math.inf).all()):
        return GIVES_INF
    return SATURATES if bool((got == sign * fmt.max).all()) else MIXED


def fate_of_ties(values: Tensor, fmt: Format) -> str:
    """Say where the midpoints of neighbouring positive codes go; bfloat16 holds each exactly."""
    low = torch.tensor([fmt.decode(code) for code in range(fmt.max_code)])
    high = torch.tensor([fmt.decode(code + 1) for code in range(fmt.max_code)])
    even = torch.where(torch.arange(fmt.max_code) % 2 == 0, low, high)
    middle = ((low + high) / 2).to(torch.bfloat16)
    got = values[middle.view(torch.int16).long()]
    rules = {"to even": even, "to zero": low, "away from zero": high}
    return next((name for name, rule in rules.items() if torch.equal(got, rule)), "mixed")
