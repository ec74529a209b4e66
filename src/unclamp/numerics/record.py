"""What a cast is asked to do, and what it makes: one plan, one record, from kernel to ledger.

A plan is a value that travels with its results. Nothing is parsed on the way, except where torch's
compiler wants plain numbers and words in an operator's signature.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.formats import FORMATS, Format, get_format
from unclamp.scaling import PER_TENSOR, Granularity, parse_granularity

Signature = tuple[str, str, int, bool, bool]
"""A plan in an operator's signature: format, granularity, margin, power_of_two, guard."""


@dataclass(frozen=True, kw_only=True)
class CastPlan:
    """How a tensor is cast.

    Attributes:
        format: The format of the codes.
        granularity: Which elements share a scale.
        margin: Powers of two of headroom of a scale that is taken from the tensor itself.
        power_of_two: Whether a scale that is taken from the tensor is a power of two.
        guard: Whether a given scale that would saturate is replaced by the tensor's own.
        signature: All of it in plain types.
        largest: Where the amax lands under a scale of the tensor's own.
    """

    format: Format
    granularity: Granularity = PER_TENSOR
    margin: int = 0
    power_of_two: bool = False
    guard: bool = False
    signature: Signature = field(init=False, repr=False, compare=False)
    largest: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        powers = self.power_of_two or self.granularity.power_of_two
        # A measured amax needs no headroom: with a guard the margin is that of the prediction.
        margin = 0 if self.guard else self.margin
        names = (self.format.name, str(self.granularity), self.margin, powers, self.guard)
        object.__setattr__(self, "power_of_two", powers)
        object.__setattr__(self, "signature", names)
        object.__setattr__(self, "largest", self.format.max * 2.0**-margin)


@functools.cache
def plan_of(signature: Signature) -> CastPlan:
    """Return the plan that a signature stands for."""
    name, granularity, margin, power_of_two, guard = signature
    return CastPlan(
        format=get_format(name),
        granularity=parse_granularity(granularity),
        margin=margin,
        power_of_two=power_of_two,
        guard=guard,
    )


class Quantized(NamedTuple):
    """A tensor in FP8: one byte an element, a scale a block, and what the cast saw and lost.

    A tuple and not a dataclass: several are made in every layer and step.

    Attributes:
        codes: float8 tensor in the shape of the input, contiguous; along a matrix's first axis
            column-major on a GPU.
        scale_inv: float32; multiplies the codes back to the input's units. 0-d per tensor, else
            one a block of the matrix oriented along `axis` (`unclamp.numerics.blocks`).
        amax: Largest absolute finite element of each block, in the shape of `scale_inv`; -1
            for a tensor without a finite element.
        stats: float64 `[len(Stat)]`, what the cast saw and lost.
        plan: How it was cast.
        axis: The axis that the GEMM contracts.
        values: `dequantize` of it, where the cast has made it on the way; else None.
        turned: The codes once more in column-major memory, as a GEMM that contracts the other
            axis wants them on a GPU; None where nobody asked, and off the GPU.
        details: The closer look, where one was taken (`unclamp.numerics.inspection`).
        shows_wild: Whether NaN took the place of `scale_inv` where an element was not finite.
    """

    codes: Tensor
    scale_inv: Tensor
    amax: Tensor
    stats: Tensor
    plan: CastPlan
    axis: int = -1
    values: Tensor | None = None
    turned: Tensor | None = None
    details: Tensor | None = None
    shows_wild: bool = False

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return self.plan.granularity

    def along(self, axis: int) -> "GemmOperand":
        """Return what a GEMM that contracts this axis of a matrix gets.

        The other axis than that of the cast only where blocks are square.
        """
        if axis == self.axis % 2:
            return GemmOperand(self.codes, self.scale_inv, self.plan.granularity, axis, self.values)
        codes = self.codes if self.turned is None else self.turned
        scale_inv = self.scale_inv.t() if self.scale_inv.ndim else self.scale_inv
        return GemmOperand(codes, scale_inv, self.plan.granularity, axis, self.values)


class GemmOperand(NamedTuple):
    """A matrix as it enters a GEMM: codes and their scales, or a tensor in high precision.

    Attributes:
        tensor: `[rows, contracted]` with `axis` 1 and `[contracted, rows]` with `axis` 0.
        scale_inv: That of `Quantized`; None in high precision.
        granularity: Which elements share a scale.
        axis: The axis that the GEMM contracts.
        values: The dequantised tensor, where the cast has made it on the way.
    """

    tensor: Tensor
    scale_inv: Tensor | None
    granularity: Granularity  # no default: torch 2.11 cannot make one in a compiled graph
    axis: int = 1
    values: Tensor | None = None


def plain_operand(tensor: Tensor, axis: int = 1) -> GemmOperand:
    """Return a matrix that enters a GEMM in high precision, which contracts an axis."""
    return GemmOperand(tensor, None, PER_TENSOR, axis)


_FORMATS: dict[torch.dtype, Format] = {}


_DTYPES = {name: getattr(torch, f"float8_{name}") for name in FORMATS}


def torch_dtype(fmt: Format) -> torch.dtype:
    """Return torch's dtype of a format."""
    return _DTYPES[fmt.name]


def format_of(dtype: torch.dtype) -> Format:
    """Return the format of one of torch's float8 dtypes."""
    found = _FORMATS.get(dtype)
    if found is None:
        found = _FORMATS[dtype] = get_format(str(dtype).removeprefix("torch.float8_"))
    return found
