"""Whether casts on a device give the CPU's bits: codes, scales, amaxes and counts, exactly."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timing import Report
from unclamp import E4M3FN, FORMATS, MX, PerBlock, PerRow
from unclamp.numerics import Stat
from unclamp.numerics.cast import Quantized, quantize_plain
from unclamp.numerics.gpu.cast import quantize_tensor
from unclamp.numerics.gpu.cast_blocks import quantize_blocks

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


def check(report: Report) -> bool:
    """Compare, print what differs, and return whether nothing did."""
    wrong, count = [], 0
    scales = [None, 0.0, 1.0] if report.is_dry else [None, 0.0, 1.0, 37.7, 2.0**-20, 1e30]
    for name, x in inputs():
        x = x[:4096] if report.is_dry else x
        for fmt in FORMATS.values():
            for scale in scales:
                for guard in (False, True):
                    settings: dict[str, Any] = {"guard": guard, "margin": 1}
                    settings["power_of_two"] = scale == 0.0
                    given = None if scale is None else torch.tensor(scale)
                    there = None if given is None else given.to(report.device)
                    got = quantize_tensor(x.to(report.device), fmt, there, **settings)
                    what = difference(got, quantize_plain(x, fmt, given, **settings))
                    count += 1
                    if what is not None:
                        wrong.append(f"{name} {fmt.name} scale {scale} {settings}: {what}")
    for label, what in _matrices(report):
        count += 1
        if what is not None:
            wrong.append(f"{label}: {what}")
    for line in wrong[:20]:
        print(f"   differs: {line}")
    report.add("check: casts that differ from the CPU", len(wrong), f"of {count}", at_most=0)
    return not wrong


def _matrices(report: Report) -> Iterator[tuple[str, str | None]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(70, 150)] if report.is_dry else [(70, 150), (1000, 1500), (4096, 4096), (3, 20000)]
    for shape in shapes:
        x = torch.randn(shape, generator=generator) * torch.logspace(-4, 3, shape[1])
        x.flatten()[:: x.numel() // 5] = torch.nan
        for dtype in (torch.bfloat16, torch.float32):
            y = x.to(dtype)
            there = y.to(report.device)
            got = quantize_tensor(there, E4M3FN, turned=True)
            want = quantize_plain(y, E4M3FN)
            yield f"{shape} {dtype} turned", difference(got, want)
            assert got.turned is not None
            other = got.turned.cpu().contiguous().view(torch.uint8)
            same = torch.equal(other, want.codes.view(torch.uint8))
            yield f"{shape} {dtype} turned codes", None if same else "codes"
            for grain in (PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()):
                for axis in (0, 1):
                    own: dict[str, Any] = {"granularity": grain, "axis": axis}
                    want = quantize_plain(y, E4M3FN, **own)
                    scale = want.scale_inv.reciprocal() * 4
                    for given, guard in ((None, False), (scale, False), (scale, True)):
                        own["guard"] = guard
                        device_scale = None if given is None else given.to(report.device)
                        made = quantize_blocks(there, E4M3FN, device_scale, **own)
                        assert made is not None
                        label = f"{shape} {dtype} {grain} axis {axis} guard {guard}"
                        yield label, difference(made, quantize_plain(y, E4M3FN, given, **own))
