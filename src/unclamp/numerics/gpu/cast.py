"""`quantize` on a GPU: what is launched, on which memory.

Nothing here waits for the device or reads from it, and all memory comes from torch, so that a
cast can be captured in a CUDA graph.

Bytes of an element of two bytes: delayed and guarded scaling read 2 and write 1, with the codes
turned too 2; dynamic scaling reads 2 more. That is what the casts' time should be made of.
"""

# Launches of Triton kernels, whose constants are plain values here.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclamp.formats import E4M3FN, E5M2, Format
from unclamp.numerics.gpu import architecture
from unclamp.numerics.gpu.rounding import Numbers
from unclamp.numerics.gpu.settling import PARTS
from unclamp.numerics.gpu.slots import slot_for
from unclamp.numerics.gpu.tensorwise import cast_again, cast_tiles
from unclamp.numerics.layout import float_bits, layout
from unclamp.numerics.record import CastPlan, Quantized, torch_dtype
from unclamp.numerics.scale import check_scale
from unclamp.numerics.stats import Stat

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Tile(NamedTuple):
    """Slices of a tile, rows and columns of a slice, and how a kernel that works on it compiles.

    `registers` of a thread, or 0 for as many as it wants: fewer let more programs share a
    multiprocessor, and hide one another's waiting. `programs` a multiprocessor, as many as fit
    there at once: more would each cost a start and an end. `ahead`: where the next tile is
    fetched to meanwhile (`tensorwise.REGISTERS`, `CACHE`), or 0.
    """

    slices: int
    rows: int
    columns: int
    warps: int
    registers: int
    programs: int
    ahead: int = 0


FLAT = Tile(1, 128, 16, 4, 64, 8)
"""A tile of a tensor whose codes are written as they lie: 16 elements side by side a thread."""
TURNED = Tile(4, 16, 64, 2, 168, 6)
"""A tile that is written turned as well: 64 codes side by side one way, 128 the other."""
INTERPRETED = Tile(1, 2048, 16, 8, 0, 8)
"""A tile under Triton's interpreter, which takes its time for each program."""
SUMMED = 64
"""Programs whose findings a warp of the last program adds up at a time."""
AGAIN = 4
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


def options(tile: Tile, arch: str) -> dict[str, Any]:
    """Return how a kernel is to be compiled."""
    chosen: dict[str, Any] = {"num_warps": tile.warps}
    is_limited = tile.registers and arch.startswith("sm_")
    return chosen | ({"maxnreg": tile.registers} if is_limited else {})


def quantize_tensor(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    *,
    margin: int = 0,
    power_of_two: bool = False,
    guard: bool = False,
    turned: bool = False,
    measured: bool = False,
    counts: bool = True,
) -> Quantized:
    """Do what `quantize` does; for benches and tests, which spell a plan out."""
    plan = CastPlan(format=fmt, margin=margin, power_of_two=power_of_two, guard=guard)
    return quantize(x, plan, scale, turned=turned, measured=measured, counts=counts)


def quantize(
    x: Tensor,
    plan: CastPlan,
    scale: Tensor | None = None,
    axis: int = -1,
    *,
    turned: bool = False,
    measured: bool = False,
    counts: bool = True,
) -> Quantized:
    """Cast a tensor with one scale, as `unclamp.numerics.quantize` does; not an empty one.

    With `turned` a matrix has its codes in column-major memory too. `measured` says that the scale
    is hardly 0: without a guard it is one launch then, and slow where the scale is 0 after all.
    Without `counts` all statistics but amax and scale are 0: for measuring what counting costs.
    """
    if scale is not None:
        check_scale(scale, torch.Size())
        scale = scale.detach().to(torch.float32)
    fmt, arch = plan.format, architecture(x.device)
    settings = numbers(
        fmt,
        native=rounds_natively(fmt, arch),
        margin=0 if plan.guard else plan.margin,
        power_of_two=plan.power_of_two,
    )
    flat = INTERPRETED if arch == "cpu" else FLAT
    tile = TURNED if turned else flat
    rows, columns = x.shape if turned else (-(-x.numel() // tile.columns), tile.columns)
    tiles_along = -(-columns // tile.columns)
    tiles = -(-rows // (tile.slices * tile.rows)) * tiles_along
    is_packed = turned and rows % tile.slices == 0
    programs = min(tiles, tile.programs * _multiprocessors(x.device))
    data = x.detach().resolve_neg().contiguous().view(BITS[x.dtype])
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    other = torch.empty((columns, rows), dtype=torch.uint8, device=x.device) if turned else codes
    tops = torch.empty(programs, dtype=torch.int32, device=x.device)
    parts = torch.empty((PARTS, programs), dtype=torch.float64, device=x.device)
    stats = torch.empty(len(Stat), dtype=torch.float64, device=x.device)
    # Two tensors and not two views of one: an operator's results may not share memory.
    scale_inv, amax = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    guard = plan.guard and scale is not None
    is_alone = measured and scale is not None and not guard
    given = amax if scale is None else scale
    shape = (rows, columns, tiles_along, tiles, x.numel())
    constants = {"KIND": KINDS[x.dtype], "F": settings, "SLICES": tile.slices}
    constants |= {"BM": tile.rows, "BN": tile.columns, "TURNED": turned, "PACKED": is_packed}
    settling = {"GIVEN": scale is not None, "GUARD": guard, "ALONE": is_alone}
    settling |= {"COUNT": counts, "SIZE": SUMMED * tile.warps}
    settling["AHEAD"] = tile.ahead
    how = options(tile, arch)
    words = other.view(torch.int32) if is_packed else other
    with torch.cuda.device_of(x):
        cast_tiles[(programs,)](
            data, given, slot_for(x.device), codes, other, words, tops, parts, stats, scale_inv,
            amax, *shape, **constants, **settling, **how,
        )  # fmt: skip
        if not is_alone:
            cast_again[(min(tiles, AGAIN * _multiprocessors(x.device)),)](
                data, tops, codes, other, words, stats, *shape, **constants, **how
            )
    return Quantized(
        codes.view(torch_dtype(fmt)),
        scale_inv,
        amax,
        stats,
        plan,
        axis,
        turned=other.view(torch_dtype(fmt)).t() if turned else None,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
