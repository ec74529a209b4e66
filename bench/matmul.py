"""Every number that docs/matmul.md measures: where an FP8 GEMM loses precision, against float64.

    .venv/bin/python -m bench.matmul             the tables of the page
    .venv/bin/python -m bench.matmul --figures   its figures too, into docs/matmul/

The data come from numpy's generator, and Hopper-like sums are made of integers, so that the same
digits come out on every machine.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unclamp import E4M3FN, MX, PerBlock, PerRow, PerTensor, dequantize, quantize
from unclamp.numerics import GemmOperand, matmul
from unclamp.scaling import Granularity

SEED = 1
ROWS = 64
LENGTHS = (128, 512, 2048, 8192)
DATA = ("positive", "zero-mean", "outlier channel")
"""Uniform in [0, 1); normal; normal, with the first channel of one operand 100 times as large."""
CHANNEL = 100
SIZES = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
GRAINS: dict[str, tuple[Granularity, Granularity]] = {
    "tensor": (PerTensor(), PerTensor()),
    "rows": (PerRow(), PerRow()),
    "1x128 by 128x128": (PerBlock(1, 128), PerBlock(128, 128)),
    "MX": (MX(), MX()),
}
NOTHING = 1e-6
"""Errors below it are those of float32."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors (Frobenius) of a product of K products an element.

    Attributes:
        data: Of `DATA`.
        k: Length of the contracted axis.
        cast: Of the exact product of the cast operands, against that of the operands.
        float32: Of torch's sums in float32, against exact sums of the same codes.
        promoted: The same of a tensor core that hands its sum on every 128 products.
        fast: The same of one that does not.
        whole_promoted: Of casts and promoted sums, against the operands' own product.
        whole_fast: Of casts and fast sums.
    """

    data: str
    k: int
    cast: float
    float32: float
    promoted: float
    fast: float
    whole_promoted: float
    whole_fast: float


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """How an outlier of a size, in standard deviations, harms what lies around it.

    Attributes:
        size: What the outlier's row or column is multiplied by.
        token: Error of the other rows' outputs, by granularity, if a row of the input is large.
        channel: Error of the output, by granularity, if a column is large that no weight reads.
    """

    size: float
    token: dict[str, float]
    channel: dict[str, float]


def drawn(kind: str, rows: int, k: int, generator: np.random.Generator) -> Tensor:
    draw = generator.random if kind == "positive" else generator.standard_normal
    return torch.from_numpy(draw((rows, k)).astype(np.float32))


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def operand(x: Tensor, granularity: Granularity, axis: int = 1) -> GemmOperand:
    made = quantize(x, E4M3FN, granularity=granularity, axis=axis)
    return GemmOperand(made.codes, made.scale_inv, granularity, axis)


def exactly(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().t()


def decoded(x: Tensor, granularity: Granularity) -> Tensor:
    """Return what the codes of a cast stand for, in float64, scaled exactly."""
    made = quantize(x, E4M3FN, granularity=granularity)
    if made.scale_inv.ndim == 0:  # in float32 the product would be rounded once more
        return made.codes.float().double() * made.scale_inv.double()
    return dequantize(made).double()


@cache
def by_length() -> tuple[Errors, ...]:
    return tuple(_errors(data, k) for data in DATA for k in LENGTHS)


def _errors(data: str, k: int) -> Errors:
    generator = np.random.default_rng(SEED)
    a, b = (drawn(data, ROWS, k, generator) for _ in range(2))
    if data == "outlier channel":
        a[:, 0] *= CHANNEL
    whole = PerTensor()
    codes, operands = exactly(decoded(a, whole), decoded(b, whole)), exactly(a, b)
    sums = {
        mode: matmul(operand(a, whole), operand(b, whole), accumulate=mode)
        for mode in ("float32", "hopper", "hopper_fast")
    }
    return Errors(
        data=data, k=k, cast=error(codes, operands), float32=error(sums["float32"], codes),
        promoted=error(sums["hopper"], codes), fast=error(sums["hopper_fast"], codes),
        whole_promoted=error(sums["hopper"], operands),
        whole_fast=error(sums["hopper_fast"], operands),
    )  # fmt: skip


@cache
def by_outlier() -> tuple[Outlier, ...]:
    return tuple(_outlier(size) for size in SIZES)


def _outlier(size: float, rows: int = 32, k: int = 4096, outputs: int = 128) -> Outlier:
    generator = np.random.default_rng(SEED)
    x, weight = (drawn("zero-mean", n, k, generator) for n in (rows, outputs))
    token, channel, unread = x.clone(), x.clone(), weight.clone()
    token[0] *= size
    channel[:, 0] *= size
    unread[:, 0] = 0
    return Outlier(
        size=size,
        token={name: _lost(token, weight, grains)[1] for name, grains in GRAINS.items()},
        channel={name: _lost(channel, unread, grains)[0] for name, grains in GRAINS.items()},
    )


def _lost(
    x: Tensor, weight: Tensor, grains: tuple[Granularity, Granularity]
) -> tuple[float, float]:
    """Return the error of all rows, and that of all rows but the first."""
    found = matmul(operand(x, grains[0]), operand(weight, grains[1]))
    truth = exactly(x, weight)
    return error(found, truth), error(found[1:], truth[1:])


@cache
def by_granularity(k: int = 8192) -> dict[str, tuple[float, float]]:
    """Return the error of the sums of positive products, promoted and fast, by granularity."""
    generator = np.random.default_rng(SEED)
    a, b = (drawn("positive", ROWS, k, generator) for _ in range(2))
    found = {}
    for name, grains in GRAINS.items():
        if name == "MX":
            continue  # Hopper has no tensor core for it
        pair = operand(a, grains[0]), operand(b, grains[1])
        truth = exactly(decoded(a, grains[0]), decoded(b, grains[1]))
        found[name] = (
            error(matmul(*pair, accumulate="hopper"), truth),
            error(matmul(*pair, accumulate="hopper_fast"), truth),
        )
    return found


@cache
def by_second_cast(tokens: int = 512, channels: int = 256) -> dict[str, tuple[float, float]]:
    """Return the error of `x`, cast along the tokens: from itself, and from its other cast."""
    generator = np.random.default_rng(SEED)
    x = drawn("zero-mean", tokens, channels, generator)
    x *= torch.from_numpy(generator.lognormal(0, 1, (tokens, 1)).astype(np.float32))
    found = {}
    for name, granularity in (("rows", PerRow()), ("1x128", PerBlock(1, 128)), ("MX", MX())):
        first = dequantize(quantize(x, E4M3FN, granularity=granularity))
        found[name] = _along_tokens(x, x, granularity), _along_tokens(first, x, granularity)
    return found


def _along_tokens(x: Tensor, truth: Tensor, granularity: Granularity) -> float:
    made = quantize(x, E4M3FN, granularity=granularity, axis=0)
    return error(dequantize(made), truth.double())


def percent(share: float) -> str:
    """Return an error in percent with two figures, and what is only float32's as such."""
    if share < NOTHING:
        return "< 0.0001 %"
    text = f"{100 * share:.2g}" if share < 0.995 else f"{100 * share:.0f}"
    return f"{float(text):.15g} %"


def written(size: float) -> str:
    return f"{size:,.0f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> dict[str, str]:
    """Return the tables of the page, as they stand there."""
    by_grain = list(GRAINS)
    return {
        "sums and casts, by K": table(
            ["data", "K", "casts", "float32 sums", "promoted sums", "fast sums",
             "casts + promoted", "casts + fast"],
            [[e.data, str(e.k), *map(percent, (e.cast, e.float32, e.promoted, e.fast,
              e.whole_promoted, e.whole_fast))] for e in by_length()],
        ),
        "an outlier token: error of the other rows": table(
            ["size", *by_grain],
            [[written(o.size), *(percent(o.token[g]) for g in by_grain)] for o in by_outlier()],
        ),
        "an outlier channel that no weight reads: error of the output": table(
            ["size", *by_grain],
            [[written(o.size), *(percent(o.channel[g]) for g in by_grain)] for o in by_outlier()],
        ),
        "sums of 8192 positive products": table(
            ["granularity", "promoted", "fast"],
            [[name, *map(percent, found)] for name, found in by_granularity().items()],
        ),
        "the second operand's cast": table(
            ["granularity", "from the tensor", "from the first cast"],
            [[name, *map(percent, found)] for name, found in by_second_cast().items()],
        ),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.matmul",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--figures", action="store_true", help="draw docs/matmul/*.svg as well")
    asked = parser.parse_args()
    for title, text in tables().items():
        print(f"{title}\n\n{text}\n")
    if asked.figures:
        from bench.matmul_figures import draw  # matplotlib is a development tool

        for path in draw(Path(__file__).parent.parent / "docs" / "matmul"):
            print(f"written: {path}")
