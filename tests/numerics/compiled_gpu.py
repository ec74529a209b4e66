"""Compile the kernels for a GPU that is not here and look at the machine code's outline.

`python tests/numerics/compiled_gpu.py cuda` (sm_90) or `hip` (gfx942); `test_gpu.py` runs both.
"""

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unclamp import E4M3FN, E4M3FNUZ, E5M2
from unclamp.numerics.gpu import blockwise, tensorwise
from unclamp.numerics.gpu.cast import FLAT, SQUARE, numbers, options
from unclamp.numerics.gpu.cast_blocks import SIZE, tiling

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
POINTERS = {
    "x": "*i16", "scale": "*fp32", "flag": "*i32", "out": "*u8", "turned": "*u8", "tops": "*i32",
    "parts": "*fp64", "stats": "*fp64", "scale_inv": "*fp32", "amax": "*fp32",
}  # fmt: skip
ALIGNED = ("x", "out", "turned", "rows", "columns")


def compiled(kernel: Any, target: str, constants: dict[str, Any], how: dict[str, Any]) -> Any:
    """Compile a kernel as the first launch does for aligned bfloat16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED if n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=TARGETS[target], options=how)


def check_tensor(target: str) -> None:
    arch = "sm_90" if target == "cuda" else "gfx942"
    formats = (E4M3FN, E5M2) if target == "cuda" else (E4M3FNUZ,)
    for fmt in formats:
        for block, turned in ((FLAT, False), (SQUARE, True)):
            constants: dict[str, Any] = {"KIND": 1, "BM": block[0], "BN": block[1]}
            constants |= {"F": numbers(fmt, native=target == "cuda")}
            constants |= {"GIVEN": True, "GUARD": True, "TURNED": turned}
            how = options(block, arch)
            first = compiled(tensorwise.cast_tiles, target, constants | {"COUNT": True}, how)
            compiled(tensorwise.settle, target, constants | {"PROGRAMS": 4096}, how)
            if target == "cuda":
                check_ptx(first.asm["ptx"])


def check_ptx(ptx: str) -> None:
    """16 bytes a load and a store, the device's own rounding, no fused multiply-add."""
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert len(re.findall(r"cvt\.rn\.satfinite\.e[45]m[32]x2\.f32", ptx)) == 8  # 16 elements
    assert "fma.rn.f32" not in ptx
    assert "div.full" not in ptx


def check_blocks(target: str) -> None:
    for block, straight in (((1, 128), True), ((128, 1), False), ((128, 128), True),
                            ((1, 32), True), ((1, None), True), ((None, 1), False)):  # fmt: skip
        cut = tiling(16384, 14336, block)
        assert cut is not None
        grid = {"KIND": 1, "GM": cut.gm, "AM": cut.am, "GN": cut.gn, "AN": cut.an}
        grid |= {"IS_TALL": cut.is_tall, "IS_WIDE": cut.is_wide}
        constants = grid | {"F": numbers(E4M3FN, power_of_two=block == (1, 32))}
        constants |= {"FITS": cut.fits, "GIVEN": not straight, "GUARD": not straight}
        constants |= {"STRAIGHT": straight, "TURNED": not straight or block == (128, 128)}
        how = {"num_warps": 16, "enable_fp_fusion": False}
        compiled(blockwise.cast_blocks, target, constants, how)
        compiled(blockwise.block_tops, target, grid, how)
    compiled(blockwise.add_up, target, {"SIZE": SIZE}, {"num_warps": 8})


if __name__ == "__main__":
    check_tensor(sys.argv[1])
    if sys.argv[1] == "cuda":
        check_blocks(sys.argv[1])
