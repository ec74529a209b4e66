"""The price of a cast: what it changed of the loss, to first order.

With x a matrix, x_hat what its GEMM got in place of it, and g the gradient of the loss by x_hat:

    price = sum of g * (x_hat - x)        units of the loss; positive where the cast raised it

It falls into the part of the elements that were clamped, and that of all others: rounding, and
underflow with it. g comes in backward, when x is long gone. So the forward sets aside what clamping
took, of the clamped elements alone (`CutOff`); for the part of rounding it has to keep x.

The result is four numbers that travel and add up with a closer look (`inspection`):

    PRICES            casts priced
    CLAMP_PRICE       the part of the clamped elements
    ROUNDINGS         those of the casts of which the other part is known, too
    ROUNDING_PRICE    that part

NaN stands for a clamped cast whose price is not known, and stays so in a sum of casts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.numerics.cast import dequantize_codes
from unclamp.numerics.gradient import inverse_of_each
from unclamp.numerics.inspection import CLAMP_PRICE, DETAILS, PRICES, ROUNDING_PRICE, ROUNDINGS
from unclamp.numerics.record import CastPlan, Quantized
from unclamp.numerics.stats import Stat

FEW = 1 / 8
"""Share of the elements: at 8 bytes each, what is set aside is no more than the codes are."""
MOST_ELSEWHERE = 1 / 128
"""The same where the host cannot know how many there are, and room for as many is made."""
ALWAYS = 1024
"""So many are set aside of any matrix."""
CHUNK_ON_CPU = 1 << 16
CHUNK_ELSEWHERE = 1 << 24
"""Elements that are added up at a time."""


class CutOff(NamedTuple):
    """What clamping took of a matrix `[R, C]`, by element.

    Attributes:
        places: int32 or int64 `[n]`: row times C plus column.
        taken: float32 `[n]`: x - x_hat. NaN where it is not known.
    """

    places: Tensor
    taken: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> "CutOff":
        """Return that of a cast that clamped nothing."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(none, torch.zeros(0, device=device))

    @classmethod
    def unknown(cls, device: torch.device) -> "CutOff":
        """Return that of a cast whose clamped elements were not set aside."""
        first = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(first, torch.full((1,), torch.nan, device=device))


@torch.no_grad()
def cut_off(
    x: Tensor, q: Quantized, factor: Tensor | None = None, *, only_few: bool = False
) -> CutOff:
    """Return what a cast's clamping took, where that is of few enough elements; else unknown.

    Args:
        x: The matrix that was cast, `[R, C]`.
        q: Its cast.
        factor: `[C]`: what each column is multiplied by to give the tensor in its own units.
        only_few: Whether more than `FEW` of the elements are too many on a CPU. Elsewhere more
            than `MOST_ELSEWHERE` are in any case.

    Numerics: Inf and NaN were not clamped, and nothing was taken of them. On a CPU the host looks
    at the data; elsewhere it does not.
    """
    x = x.detach()
    if not x.numel():
        return CutOff.nothing(x.device)
    each = inverse_of_each(q.scale_inv, x, q.plan, q.axis)
    is_there = is_known = None
    if x.device.type != "cpu":
        places, is_there, is_known = _clamped_elsewhere(x, each, q.plan)
    elif only_few and q.stats[Stat.SATURATED] > max(ALWAYS, FEW * x.numel()):
        return CutOff.unknown(x.device)
    else:
        places = _largest(q)
    rows, columns = _split(places, x.shape[1])
    values = x[rows, columns].to(torch.float32)
    each = each.expand(x.shape)[rows, columns]
    is_clamped = _is_clamped(values, each, q.plan)
    if is_there is not None:
        is_clamped &= is_there
    else:
        places, values, each, columns = (t[is_clamped] for t in (places, values, each, columns))
        is_clamped = is_clamped[is_clamped]
    taken = torch.where(is_clamped, values - torch.copysign(q.plan.format.max * each, values), 0)
    taken = taken if factor is None else taken * factor[columns]
    taken = taken if is_known is None else torch.where(is_known, taken, torch.nan)
    is_small = x.device.type == "cpu" and x.numel() < 1 << 31
    return CutOff(places.to(torch.int32) if is_small else places, taken)


def _largest(q: Quantized) -> Tensor:
    """Return the places of codes of the largest value: all that were clamped are among them."""
    codes = q.codes.view(torch.uint8).reshape(-1)
    return ((codes & 0x7F) == q.plan.format.max_code).nonzero().squeeze(1)


def _clamped_elsewhere(x: Tensor, each: Tensor, plan: CastPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return places of clamped elements, as many as there is room for; which are; if all are."""
    room = min(x.numel(), max(ALWAYS, int(MOST_ELSEWHERE * x.numel())))
    mask = _is_clamped(x.to(torch.float32), each, plan).reshape(-1)
    places = torch.nonzero_static(mask, size=room, fill_value=0).squeeze(1)
    count = mask.sum()
    return places, torch.arange(room, device=x.device) < count, count <= room


def _split(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of places in a matrix."""
    return places.div(max(width, 1), rounding_mode="floor"), places % max(width, 1)


def clamped_rows(cut: CutOff, width: int) -> tuple[Tensor, CutOff]:
    """Return the rows of a matrix that have clamped elements, and these as those of such rows."""
    rows, columns = _split(cut.places.long(), width)
    some, own = rows.unique(return_inverse=True)
    return some, CutOff(own * width + columns, cut.taken)


def _is_clamped(values: Tensor, each_inv: Tensor, plan: CastPlan) -> Tensor:
    scaled = values.abs() * each_inv.reciprocal()
    return (scaled > plan.format.overflow_limit) & values.isfinite()


@torch.no_grad()
def clamp_price(cut: CutOff, grad: Tensor) -> Tensor:
    """Return the part of the clamped elements, float64 0-d.

    Args:
        cut: What was set aside.
        grad: The gradient by the matrix, in its shape.
    """
    slopes = grad.detach()[_split(cut.places.long(), grad.shape[1])]
    return -torch.dot(slopes.double(), cut.taken.double())


@torch.no_grad()
def whole_price(
    x: Tensor,
    codes: Tensor,
    scale_inv: Tensor,
    plan: CastPlan,
    grad: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """Return both parts of a price, float64 `[2]`: that of the clamped elements comes first.

    Args:
        x: The matrix, `[R, C]`, in its own units.
        codes: Of its cast along the last axis.
        scale_inv: As in `Quantized`.
        plan: How it was cast.
        grad: The gradient by the matrix, in its shape.
        factor: `[C]`: each column of it was divided by this before it was cast.

    Numerics: elements that are Inf or NaN are left out.
    """
    x, sums = x.detach(), torch.zeros(2, dtype=torch.float64, device=x.device)
    if not x.numel():
        return sums
    hats = dequantize_codes(codes, scale_inv, granularity=plan.granularity, axis=1)
    each = inverse_of_each(scale_inv, x, plan, 1).expand(x.shape)
    chunk = CHUNK_ON_CPU if x.device.type == "cpu" else CHUNK_ELSEWHERE
    rows = max(1, chunk // x.shape[1])
    parts = (t.split(rows) for t in (x, hats, each, grad.detach()))
    for values, hat, inv, slope in zip(*parts, strict=True):
        values = values.to(torch.float32)
        values = values if factor is None else values / factor
        changed = torch.where(values.isfinite(), hat.double() - values.double(), 0)
        changed = changed if factor is None else changed * factor
        products = changed * slope.double()
        is_clamped = _is_clamped(values, inv, plan)
        sums[0] += torch.where(is_clamped, products, 0).sum()
        sums[1] += torch.where(is_clamped, 0, products).sum()
    return sums


def price_look(clamp: Tensor, rounding: Tensor | None = None) -> Tensor:
    """Return a closer look that holds a price and nothing else, float64 `[DETAILS]`.

    Args:
        clamp: The part of the clamped elements.
        rounding: That of the others; None where it is not known.
    """
    look = torch.zeros(DETAILS, dtype=torch.float64, device=clamp.device)
    look[PRICES], look[CLAMP_PRICE] = 1, clamp
    if rounding is not None:
        look[ROUNDINGS], look[ROUNDING_PRICE] = 1, rounding
    return look
