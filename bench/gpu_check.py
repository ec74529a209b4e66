"""Whether casts on a device give the CPU's bits: codes, scales, amaxes and counts, exactly."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import TimeoutError, get_context  # not the built-in one
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timing import Report
from unclamp import E4M3FN, FORMATS, MX, Format, PerBlock, PerRow
from unclamp.numerics import Stat
from unclamp.numerics.cast import Quantized, quantize_plain
from unclamp.numerics.gpu.cast import quantize_tensor
from unclamp.numerics.gpu.cast_blocks import quantize_blocks
from unclamp.scaling import Granularity

SUMS = [Stat.SQUARE, Stat.SATURATED_SQUARE]
COUNTS = [field for field in Stat if field not in SUMS]
SPECIAL = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 448.0, 464.0, 464.1, -480.0,
           61440.0, 3e38, -3e38, 1e-45, -1e-38, 2.0**-9, 2.0**-10, 2.0**-17]  # fmt: skip


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Yield every bfloat16 and float16 value, a million float32 patterns, the special values."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    yield "every bfloat16", every.view(torch.bfloat16)
    yield "every float16", every.view(torch.float16)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=generator)
    yield "float32 patterns", bits.to(torch.int32).view(torch.float32)
    yield "special values", torch.tensor(SPECIAL)


def difference(got: Quantized, want: Quantized) -> str | None:
    """Return what differs; None where all is the same."""
    codes = [q.codes.cpu().contiguous().view(torch.uint8) for q in (got, want)]
    if not torch.equal(*codes):
        where = (codes[0] != codes[1]).flatten().nonzero()[:3].flatten().tolist()
        return f"{int((codes[0] != codes[1]).sum())} codes, the first at {where}"
    if not torch.equal(got.scale_inv.cpu(), want.scale_inv):
        return "scale_inv"
    if not torch.equal(got.amax.cpu(), want.amax):
        return "amax"
    stats = got.stats.cpu()
    if not torch.equal(stats[COUNTS], want.stats[COUNTS]):
        return f"counts {stats.tolist()} against {want.stats.tolist()}"
    if not torch.allclose(stats[SUMS], want.stats[SUMS], rtol=1e-5, atol=0):
        return "sums of squares"
    return None


@dataclass(frozen=True)
class Case:
    """One cast: of a whole tensor, or of a matrix with a granularity."""

    label: str
    x: Tensor
    fmt: Format
    factor: float | None
    settings: dict[str, Any]

    def difference(self, device: torch.device) -> str | None:
        """Cast on the device and on the CPU; return what differs, None where all is the same."""
        plain = {k: v for k, v in self.settings.items() if k != "turned"}
        scale = None if self.factor is None else torch.tensor(self.factor)
        if "granularity" in plain and scale is not None:
            free = {k: v for k, v in plain.items() if k != "guard"}
            scale = quantize_plain(self.x, self.fmt, **free).scale_inv.reciprocal() * scale
        want = quantize_plain(self.x, self.fmt, scale, **plain)
        there = None if scale is None else scale.to(device)
        quantize = quantize_blocks if "granularity" in plain else quantize_tensor
        got = quantize(self.x.to(device), self.fmt, there, **self.settings)
        if got is None:
            return "no kernel takes it"
        what = difference(got, want)
        if what is None and "turned" in self.settings:
            assert got.turned is not None
            other = got.turned.cpu().contiguous().view(torch.uint8)
            return None if torch.equal(other, want.codes.view(torch.uint8)) else "turned codes"
        return what


@functools.cache
def cases(*, is_dry: bool) -> list[list[Case]]:
    """Return all comparisons, in groups that share their kernels."""
    return [list(group) for group in (*_tensors(is_dry), *_matrices(is_dry))]


def _tensors(is_dry: bool) -> Iterator[Iterator[Case]]:
    scales = [None, 0.0, 1.0] if is_dry else [None, 0.0, 1.0, 37.7, 2.0**-20, 1e30]

    def group(name: str, x: Tensor, fmt: Format, guard: bool) -> Iterator[Case]:
        for scale in scales:
            settings = {"guard": guard, "margin": 1, "power_of_two": scale == 0.0}
            yield Case(f"{name} {fmt.name} scale {scale} {settings}", x, fmt, scale, settings)

    for name, x in inputs():
        for fmt in FORMATS.values():
            for guard in (False, True):
                yield group(name, x[:4096] if is_dry else x, fmt, guard)


def _matrices(is_dry: bool) -> Iterator[Iterator[Case]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(70, 150)] if is_dry else [(70, 150), (1000, 1500), (4096, 4096), (3, 20000)]

    def turned(label: str, x: Tensor) -> Iterator[Case]:
        yield Case(f"{label} turned", x, E4M3FN, None, {"turned": True})

    def blocks(label: str, x: Tensor, grain: Granularity, axis: int) -> Iterator[Case]:
        for factor, guard in ((None, False), (4.0, False), (4.0, True)):
            settings = {"granularity": grain, "axis": axis, "guard": guard}
            yield Case(f"{label} {settings}", x, E4M3FN, factor, settings)

    for shape in shapes:
        x = torch.randn(shape, generator=generator) * torch.logspace(-4, 3, shape[1])
        x.flatten()[:: x.numel() // 5] = torch.nan
        for dtype in (torch.bfloat16, torch.float32):
            label, y = f"{shape} {dtype}", x.to(dtype)
            yield turned(label, y)
            for grain in (PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()):
                for axis in (0, 1):
                    yield blocks(label, y, grain, axis)


def compare(index: int, device: str, is_dry: bool) -> list[str]:
    """Compare one group of cases; return a line for each that differs or raises."""
    torch.set_num_threads(1)
    wrong = []
    for case in cases(is_dry=is_dry)[index]:
        try:
            what = case.difference(torch.device(device))
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if what is not None:
            wrong.append(f"{case.label}: {what}")
    return wrong


def check(report: Report) -> bool:
    """Compare, print what differs, and return whether nothing did.

    Compiling takes most of the time, so groups are shared among processes, one for each core.
    """
    groups = cases(is_dry=report.is_dry)
    workers = 1 if report.is_dry else min(16, os.cpu_count() or 1)
    work = functools.partial(compare, device=report.device.type, is_dry=report.is_dry)
    wrong, compared = [], 0
    with get_context("spawn").Pool(workers) as pool:  # ends its processes when it is left
        parts = pool.imap(work, range(len(groups)))
        for group in groups:
            try:
                wrong += parts.next(timeout=max(report.left_s, 0.1))
            except TimeoutError:
                break
            compared += len(group)
    for line in wrong[:20]:
        print(f"   differs: {line}")
    count = sum(len(group) for group in groups)
    report.add("casts that differ from the CPU's", len(wrong), f"of {compared}", at_most=0)
    if compared < count:
        report.leave_out("check", f"{count - compared} of {count} casts were not compared in time")
    return not wrong and compared == count
