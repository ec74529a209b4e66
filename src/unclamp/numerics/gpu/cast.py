"""`quantize` on a GPU: what is launched, on which memory.

Nothing here waits for the device or reads from it, and all memory comes from torch, so that a
cast can be captured in a CUDA graph.

Bytes of an element of two bytes: delayed and guarded scaling read 2 and write 1, with the codes
turned too 2; dynamic scaling reads 2 more. That is what the casts' time should be made of.
"""

# Launches of Triton kernels, whose constants are plain values here.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
from typing import Any

import torch
from torch import Tensor

from unclamp.formats import E4M3FN, E5M2, Format
from unclamp.numerics.cast import Quantized, check_scale, torch_dtype
from unclamp.numerics.gpu import architecture
from unclamp.numerics.gpu.rounding import Numbers
from unclamp.numerics.gpu.tensorwise import PARTS, cast_tiles, settle
from unclamp.numerics.layout import float_bits, layout
from unclamp.numerics.stats import Stat
from unclamp.scaling import PER_TENSOR

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FLAT = (1, 2048)
"""A tile of a tensor whose codes are written as they lie."""
SQUARE = (64, 64)
"""A tile that is written turned as well: 64 codes side by side either way."""
INTERPRETED = (1, 32768)
"""A tile under Triton's interpreter, which takes its time for each program."""
WARPS = {FLAT: 4, SQUARE: 8, INTERPRETED: 8}
REGISTERS = {FLAT: 96, SQUARE: 80}
"""Of a thread, which has 16 elements: as few as make the usual branch spill (almost) nothing, so
that five, and three, programs share a multiprocessor."""
MOST_PROGRAMS = 4096
SETTLERS = 4
"""Programs a multiprocessor that cast again."""


@functools.cache
def numbers(
    fmt: Format, *, native: bool = False, margin: int = 0, power_of_two: bool = False
) -> Numbers:
    """Return a format and the settings of its scale as the kernels want them."""
    plain = layout(fmt)
    return Numbers(
        shift=int(plain.shift),
        half=int(plain.half),
        rebias=int(plain.rebias),
        min_normal=int(plain.min_normal_bits),
        magic=float(plain.magic),
        magic_bits=int(plain.magic_bits),
        max=float(plain.max),
        max_bits=int(float_bits(plain.max)),
        limit=float(plain.limit),
        vanishing=float(plain.vanishing),
        nan_code=int(plain.nan_code),
        nan_is_signed=bool(plain.nan_is_signed),
        zero_is_signed=bool(plain.zero_is_signed),
        exponent_bits=fmt.exponent_bits,
        native=native,
        largest=fmt.max * 2.0**-margin,
        margin=margin,
        power_of_two=power_of_two,
    )


def rounds_natively(fmt: Format, arch: str) -> bool:
    """Whether a device rounds to a format itself, to nearest even and saturating.

    NVIDIA's do from compute capability 8.9 on (PTX, `cvt.rn.satfinite.e4m3x2.f32`).
    """
    if fmt not in (E4M3FN, E5M2) or not arch.startswith("sm_"):
        return False
    return int(arch.removeprefix("sm_")) >= 89


def options(block: tuple[int, int], arch: str) -> dict[str, Any]:
    """Return how a kernel is to be compiled.

    A fused multiply-add would round once where the CPU rounds twice.
    """
    chosen: dict[str, Any] = {"num_warps": WARPS[block], "enable_fp_fusion": False}
    return chosen | ({"maxnreg": REGISTERS[block]} if arch.startswith("sm_") else {})


def quantize_tensor(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    *,
    margin: int = 0,
    power_of_two: bool = False,
    guard: bool = False,
    turned: bool = False,
    counts: bool = True,
) -> Quantized:
    """Cast a tensor with one scale, as `unclamp.numerics.quantize` does; not an empty one.

    With `turned` a matrix has its codes in column-major memory too. Without `counts` all
    statistics but amax and scale are 0: for measuring what counting costs.
    """
    if scale is not None:
        check_scale(scale, torch.Size())
        scale = scale.detach().to(torch.float32)
    arch = architecture(x.device)
    settings = numbers(
        fmt,
        native=rounds_natively(fmt, arch),
        margin=0 if guard else margin,
        power_of_two=power_of_two,
    )
    rows, columns = x.shape if turned else (1, x.numel())
    flat = INTERPRETED if arch == "cpu" else FLAT
    block = SQUARE if turned else flat
    tiles_along = -(-columns // block[1])
    tiles = -(-rows // block[0]) * tiles_along
    programs = min(tiles, MOST_PROGRAMS)
    data = x.detach().contiguous().view(BITS[x.dtype])
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    other = torch.empty((columns, rows), dtype=torch.uint8, device=x.device) if turned else codes
    tops = torch.empty(programs, dtype=torch.int32, device=x.device)
    parts = torch.empty((PARTS, programs), dtype=torch.float64, device=x.device)
    stats = torch.empty(len(Stat), dtype=torch.float64, device=x.device)
    results = torch.empty(2, dtype=torch.float32, device=x.device)
    guard = guard and scale is not None
    flag = torch.zeros(1, dtype=torch.int32, device=x.device) if guard else tops
    given = results if scale is None else scale
    shape = (rows, columns, tiles_along, tiles)
    constants = {"KIND": KINDS[x.dtype], "F": settings, "BM": block[0], "BN": block[1]}
    constants |= {"GIVEN": scale is not None, "GUARD": guard, "TURNED": turned}
    how = options(block, arch)
    with torch.cuda.device_of(x):
        cast_tiles[(programs,)](
            data, given, flag, codes, other, tops, parts, stats, *shape,
            **constants, COUNT=counts, **how,
        )  # fmt: skip
        settle[(min(tiles, _settlers(x.device)),)](
            data, given, codes, other, tops, parts, stats, results[:1], results[1:], *shape,
            programs, x.numel(), **constants, PROGRAMS=max(_power_of_two(programs), 16), **how,
        )  # fmt: skip
    return Quantized(
        codes=codes.view(torch_dtype(fmt)),
        scale_inv=results[0],
        amax=results[1],
        stats=stats,
        granularity=PER_TENSOR,
        turned=other.view(torch_dtype(fmt)).t() if turned else None,
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _settlers(device: torch.device) -> int:
    if device.type != "cuda":
        return SETTLERS
    return SETTLERS * torch.cuda.get_device_properties(device).multi_processor_count
