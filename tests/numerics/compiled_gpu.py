"""Compile the kernels for a GPU that is not here and look at the machine code's outline.

`python tests/numerics/compiled_gpu.py cuda` (sm_90) or `hip` (gfx942); `test_gpu.py` runs both.
`direct` compiles nothing, and looks at what is launched.
"""

# Triton types its abstract driver as returning nothing.
# pyright: reportIncompatibleMethodOverride=false

import functools
import re
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource, CompiledKernel

from unclamp import E4M3FN, E4M3FNUZ, E5M2, MX, PerBlock, PerRow
from unclamp.numerics.gpu import blockwise, cast, cast_blocks, tensorwise
from unclamp.numerics.gpu.cast import FLAT, SUMMED, TURNED, numbers, options
from unclamp.numerics.gpu.cast_blocks import SIZE, tiling

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
POINTERS = {
    "x": "*bf16", "scale": "*fp32", "slot": "*i32", "out": "*u8", "turned": "*u8",
    "scratch": "*fp64", "tops": "*i32", "parts": "*fp64", "stats": "*fp64",
    "scale_inv": "*fp32", "amax": "*fp32",
}  # fmt: skip
ALIGNED = ("x", "slot", "out", "turned", "rows", "columns", "elements")


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
        for tile in (FLAT, TURNED):
            turned = tile is TURNED
            constants: dict[str, Any] = {"KIND": 1, "SLICES": tile.slices, "BM": tile.rows}
            constants |= {"BN": tile.columns, "F": numbers(fmt, native=target == "cuda")}
            constants |= {"TURNED": turned, "PACKED": turned}
            how = options(tile, arch)
            settling = {
                "GIVEN": True,
                "COUNT": True,
                "SIZE": SUMMED * tile.warps,
                "AHEAD": tile.ahead,
            }
            for guard, alone in ((True, False), (False, True)):
                ways = settling | {"GUARD": guard, "ALONE": alone, "SHOWS": alone}
                first = compiled(tensorwise.cast_tiles, target, constants | ways, how)
                if target == "cuda":
                    check_ptx(first.asm["ptx"], slices=tile.slices * (1 + alone))
                    check_last_program(first.asm["ptx"])
            compiled(tensorwise.cast_again, target, constants, how)


def check_ptx(ptx: str, *, slices: int) -> None:
    """16 bytes a load and a store, exact division, and the device's own rounding.

    Its halves leave the assembly as a word only: `rounding.device_codes` says why.
    """
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    each = 16 // 2  # elements of a thread and slice, two a conversion
    rounded = re.findall(r"cvt\.rn\.satfinite\.e[45]m[32]x2\.f32\s+(\S+),", ptx)
    assert len(rounded) == each * slices
    assert set(rounded) == {"low", "high"}
    assert "div.full" not in ptx


def check_last_program(ptx: str) -> None:
    """Findings are written, then all threads of the program meet, then one counts it.

    The count releases what was written and acquires what others wrote; findings are read past the
    first cache.
    """
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u?s?32|"
                             r"atom\.acq_rel\.gpu\.global\.add\.u?s?32", ptx)  # fmt: skip
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert "bar.sync" in after[: after.index("ld.global")]
    assert after.count("ld.global.cg") >= 1 + 5


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
        made = compiled(blockwise.cast_blocks, target, constants | {"SIZE": SIZE}, how)
        check_last_program(made.asm["ptx"])
        compiled(blockwise.block_tops, target, grid, how)


class Device(DriverBase):
    """Stands for an H100, so that Triton's launcher goes all the way but the last step."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return TARGETS["cuda"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return None


class Launcher:
    """Takes the place of a kernel: binds and compiles a launch, and does not launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.kernel.warmup, grid=grid)


def check_launches() -> None:
    """Bind every kind of launch as the launcher would on an H100: arguments, options, code."""
    triton.runtime.driver.set_active(Device())
    cast.architecture = lambda device: "sm_90"
    for module, names in ((cast, ("cast_tiles", "cast_again")),
                          (cast_blocks, ("block_tops", "cast_blocks"))):  # fmt: skip
        for name in names:
            setattr(module, name, Launcher(getattr(module, name)))
    x, scale = torch.randn(256, 512), torch.tensor(1.0)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for fmt in (E4M3FN, E5M2):
            cast.quantize_tensor(x.to(dtype), fmt, scale, guard=True, turned=True)
            cast.quantize_tensor(x.to(dtype), fmt, power_of_two=True, margin=1)
            cast.quantize_tensor(x.to(dtype), fmt, scale, measured=True)
    cast.quantize_tensor(x[:, :77], E4M3FNUZ, scale, counts=False)
    for granularity in (PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()):
        for axis in (0, 1):
            cast_blocks.quantize_blocks(x, E4M3FN, granularity=granularity, axis=axis)
    cast_blocks.quantize_blocks(torch.randn(3, 20000), E4M3FN, granularity=PerRow())


class Kept(CompiledKernel):
    """Takes the place of code: notes what it is launched with."""

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.module, self.function, self.packed_metadata = 1, 0, None
        self._run = lambda *args: launched.append(args)

    def launch_metadata(self, *_: Any) -> Any:
        return None


def check_direct() -> None:
    """What is launched past Triton's launcher is what that would launch, argument for argument."""
    triton.runtime.driver.set_active(Device())
    cast.architecture = lambda device: "sm_90"
    launched: list[tuple[Any, ...]] = []
    searched: list[str] = []
    kernels: list[Any] = [tensorwise.cast_tiles, tensorwise.cast_again]
    for kernel in kernels:
        kernel._do_compile = functools.partial(_kept, kernel, launched)
        kernel.run = functools.partial(_searching, kernel.run, kernel.__name__, searched)
    x, scale = torch.randn(64, 512).to(torch.bfloat16), torch.tensor(2.0)
    for settings in ({"measured": True}, {"turned": True}, {"turned": True, "guard": True}):
        names = ["cast_tiles"] if "measured" in settings else ["cast_tiles", "cast_again"]
        for value in (x, x[:, :500].contiguous()):
            launched.clear()
            for given in (scale, torch.ones(3)[1]):  # an address that is no multiple of 16
                cast.quantize_tensor(value, E4M3FN, given, **settings)
                assert searched == names  # the first time alone
            searched.clear()
            found, again = launched[: len(names)], launched[len(names) :]
            assert [_plain(args) for args in found] == [_plain(args) for args in again]
    far = torch.empty(64 * 512 + 1, dtype=torch.bfloat16)[1:].view(64, 512)
    for _ in range(2):  # code for any address, which Triton is to find
        cast.quantize_tensor(far, E4M3FN, scale, measured=True)
    assert searched == ["cast_tiles"] * 2
    tensorwise.cast_tiles.add_pre_run_hook(lambda *args, **kwargs: None)
    cast.quantize_tensor(x, E4M3FN, scale, measured=True)  # a hook is not passed by
    assert searched == ["cast_tiles"] * 3


def _kept(kernel: Any, launched: list[tuple[Any, ...]], key: Any, *_: Any) -> Any:
    made = Kept(launched)
    kernel.device_caches[0][0][key] = made
    return made


def _searching(run: Any, name: str, searched: list[str], *args: Any, **kwargs: Any) -> Any:
    searched.append(name)
    return run(*args, **kwargs)


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a kernel is launched with, of tensors what they are."""
    return tuple((a.dtype, a.shape) if isinstance(a, Tensor) else a for a in args)


if __name__ == "__main__":
    if sys.argv[1] == "direct":
        check_direct()
        sys.exit()
    check_tensor(sys.argv[1])
    if sys.argv[1] == "cuda":
        check_blocks(sys.argv[1])
        check_launches()
