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
from unclamp.numerics.gpu.launching import Direct
from unclamp.numerics.gpu.rounding import Numbers
from unclamp.numerics.gpu.settling import PARTS
from unclamp.numerics.gpu.slots import room_for
from unclamp.numerics.gpu.tensorwise import cast_again, cast_tiles
from unclamp.numerics.layout import float_bits, layout
from unclamp.numerics.record import CastPlan, Quantized, Signature, plan_of, torch_dtype
from unclamp.numerics.scale import check_scale
from unclamp.numerics.stats import Stat

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALAR = torch.Size()
STATS = len(Stat)


class Tile(NamedTuple):
    """Slices of a tile, rows and columns of a slice, and how a kernel that works on it compiles.

    `registers` of a thread, or 0 for as many as it wants: fewer let more programs share a
    multiprocessor, and hide one another's waiting. `programs` a multiprocessor, as many as fit
    there at once: more would each cost a start and an end. With `ahead` the next tile
    is loaded while one is cast.
    """

    slices: int
    rows: int
    columns: int
    warps: int
    registers: int
    programs: int
    ahead: bool = False


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
    apart: bool = False,
    shows_wild: bool = False,
) -> Quantized:
    """Cast a tensor with one scale, as `unclamp.numerics.quantize` does; not an empty one.

    With `turned` a matrix has its codes in column-major memory too. `measured` says that the scale
    is hardly 0: without a guard it is one launch then, and slow where the scale is 0 after all.
    Without `counts` all statistics but amax and scale are 0: for measuring what counting costs.
    With `apart` no two results share memory, which an operator's may not; it takes the host more.
    With `shows_wild` the result stands for NaN alone where an element is not finite.
    """
    device = x.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device_of(x):
            return quantize(
                x, plan, scale, axis, turned=turned, measured=measured, counts=counts, apart=apart,
                shows_wild=shows_wild,
            )  # fmt: skip
    is_given = scale is not None
    if is_given:
        check_scale(scale, SCALAR)
        scale = scale.detach() if scale.requires_grad else scale
        scale = scale if scale.dtype == torch.float32 else scale.to(torch.float32)
    is_alone = measured and is_given and not plan.guard
    arch = architecture(device)
    flat = INTERPRETED if arch == "cpu" else FLAT
    launch = _launch(
        x.shape, x.dtype, plan.signature, arch, TURNED if turned else flat,
        _multiprocessors(device), turned, is_given, is_alone, counts, shows_wild,
    )  # fmt: skip
    rows, columns, _ = launch.shape
    data = (x.detach() if x.requires_grad else x).resolve_neg().contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    other = torch.empty((columns, rows), dtype=torch.uint8, device=device) if turned else codes
    stats = torch.empty(STATS, dtype=torch.float64, device=device)
    if apart:
        scale_inv, amax = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    else:
        scale_inv, amax = torch.empty(2, dtype=torch.float32, device=device).unbind()
    slot, scratch = room_for(device, (1 + PARTS) * launch.programs, leaves=not is_alone)
    launch.first(
        cast_tiles, launch.programs, device, (data, slot, codes, other, scratch, stats),
        scale if is_given else amax, scale_inv, amax, *launch.shape,
    )  # fmt: skip
    if not is_alone:
        launch.again(
            cast_again, min(launch.tiles, AGAIN * _multiprocessors(device)), device,
            (data, codes, other, scratch, stats), *launch.shape,
        )  # fmt: skip
    dtype = torch_dtype(plan.format)
    made = other.view(dtype).t() if turned else None
    return Quantized(
        codes.view(dtype), scale_inv, amax, stats, plan, axis, None, made, None, shows_wild
    )


class Launch(NamedTuple):
    """What a cast's launches are, whatever lies in the tensor.

    Attributes:
        shape: Rows and columns of the matrix that tiles are cut of, and elements.
        tiles: How many there are.
        programs: Programs of the first launch.
        first: The first launch.
        again: The second one.
    """

    shape: tuple[int, int, int]
    tiles: int
    programs: int
    first: Direct
    again: Direct


@functools.lru_cache(4096)  # sequences have many lengths
def _launch(
    shape: torch.Size, dtype: torch.dtype, signature: Signature, arch: str, tile: Tile,
    multiprocessors: int, turned: bool, is_given: bool, is_alone: bool, counts: bool,
    shows_wild: bool,
) -> Launch:  # fmt: skip
    """Return the launches of a cast: asked of the same layers at every step."""
    plan, elements = plan_of(signature), shape.numel()
    rows, columns = shape if turned else (-(-elements // tile.columns), tile.columns)
    tiles = -(-rows // (tile.slices * tile.rows)) * -(-columns // tile.columns)
    settings = numbers(
        plan.format,
        native=rounds_natively(plan.format, arch),
        margin=0 if plan.guard else plan.margin,
        power_of_two=plan.power_of_two,
    )
    constants = {"KIND": KINDS[dtype], "F": settings, "SLICES": tile.slices}
    constants |= {"BM": tile.rows, "BN": tile.columns, "TURNED": turned}
    constants |= {"PACKED": turned and rows % tile.slices == 0}
    settling = {"GIVEN": is_given, "GUARD": plan.guard and is_given, "ALONE": is_alone}
    settling |= {"COUNT": counts, "SHOWS": shows_wild, "SIZE": SUMMED * tile.warps}
    settling["AHEAD"] = tile.ahead
    how = options(tile, arch)
    return Launch(
        shape=(rows, columns, elements),
        tiles=tiles,
        programs=min(tiles, tile.programs * multiprocessors),
        first=Direct(constants | settling, how),
        again=Direct(constants, how),
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
