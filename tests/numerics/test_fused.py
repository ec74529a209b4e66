"""The fused kernels against plain torch: the same bits, whatever goes in and however many work."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from torch import Tensor

from patience import PATIENCE_S
from unclamp import E4M3FN, FORMATS, MX, PerBlock, PerRow, PerTensor, dequantize, quantize
from unclamp.numerics import Stat, cpu
from unclamp.numerics.cast import Quantized, quantize_plain

SUMS = [Stat.SQUARE, Stat.SATURATED_SQUARE]
COUNTS = [field for field in Stat if field not in SUMS]
GRANULARITIES = [PerTensor(), PerRow(), PerBlock(1, 128), PerBlock(128, 128), PerBlock(3, 5), MX()]
EVERY_HALF = torch.arange(65536, dtype=torch.int32).to(torch.uint16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan()
    pairs = (t.contiguous().view(torch.int32)[~nan] for t in (a, b))
    return bool(torch.equal(nan, b.isnan()) and torch.equal(*pairs))


def check(x: Tensor, fmt, scale: Tensor | None = None, **settings) -> Quantized:
    """Assert that both paths agree, and that values are what the codes decode to."""
    room = torch.empty(x.numel())
    got = quantize(x, fmt, scale, values=room, **settings)
    want = quantize_plain(x, fmt, scale, **settings)
    assert got.values is not None
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert same_bits(got.scale_inv, want.scale_inv)
    assert same_bits(got.amax, want.amax)
    assert torch.equal(got.stats[COUNTS], want.stats[COUNTS])
    torch.testing.assert_close(got.stats[SUMS], want.stats[SUMS], rtol=1e-6, atol=0)
    assert got.values.shape == x.shape
    assert same_bits(got.values, dequantize(want))
    return got


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 37.7, 2.0**-20])
def test_every_half_precision_input(dtype, fmt, scale):
    check(EVERY_HALF.view(dtype), fmt, torch.tensor(scale))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_float32_bit_patterns(fmt):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator)
    x = bits.to(torch.int32).view(torch.float32)
    for scale in (1.0, 1e-30, 1e30):
        check(x, fmt, torch.tensor(scale))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_odd_matrices(dtype, axis, granularity):
    for shape in ((1, 1), (5, 1), (1, 7), (129, 257), (70, 1500)):
        x = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
        x.flatten()[:: max(x.numel() // 3, 1)] = torch.nan
        check(x.to(dtype), E4M3FN, granularity=granularity, axis=axis)


@run(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 2100)),
    granularity=st.sampled_from(GRANULARITIES),
    axis=st.sampled_from([0, 1]),
    settings=st.fixed_dictionaries(
        {"margin": st.integers(0, 5), "power_of_two": st.booleans(), "guard": st.booleans()}
    ),
    factor=st.floats(0, 8),
    seed=st.integers(0, 99),
)
def test_any_matrix_setting_and_given_scale(shape, granularity, axis, settings, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    own = check(x, E4M3FN, granularity=granularity, axis=axis, **settings)
    scale = own.scale_inv.reciprocal() * factor  # 0 means: not measured yet
    check(x, E4M3FN, scale, granularity=granularity, axis=axis, **settings)


@pytest.mark.parametrize(
    ("granularity", "axis"),
    [(PerRow(), 0), (PerBlock(600, 7), -1), (PerBlock(1, 1200), 0), (PerBlock(700, 900), 1)],
    ids=["columns", "600x7", "1x1200 down", "700x900"],
)
def test_blocks_too_tall_for_one_visit(granularity, axis):
    x = torch.randn(1300, 800) * torch.logspace(-3, 3, 800)
    x[::170, ::3] = torch.nan
    own = check(x, E4M3FN, granularity=granularity, axis=axis)
    scale = own.scale_inv.reciprocal() * torch.logspace(-2, 2, own.scale_inv.numel()).view(
        own.scale_inv.shape
    )
    for guard in (False, True):
        check(x, E4M3FN, scale, granularity=granularity, axis=axis, guard=guard)


@pytest.mark.parametrize("factor", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_tensor_of_several_tasks(factor, power_of_two):
    x = torch.randn(1_200_001)
    x[[5, 700_000]] = torch.tensor([torch.nan, -torch.inf])
    scale = check(x, E4M3FN).scale_inv.reciprocal() * factor
    for guard in (False, True):
        got = check(x, E4M3FN, scale, guard=guard, power_of_two=power_of_two)
        assert got.stats[Stat.RECAST] == (guard and factor > 1)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [1.0, 37.7, 2.0**-20, 2.0**100])
def test_what_lies_around_every_code(fmt, scale):
    """Each value of the format, each middle between two, and their neighbours in float32."""
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{fmt.name}"))
    values = codes.float()
    values = torch.cat([values[values.isfinite()].unique(), torch.tensor([fmt.overflow_limit])])
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2]) / scale
    up, down = (torch.nextafter(exact, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    check(torch.cat([exact, up, down]).repeat(7), fmt, torch.tensor(scale))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "3-d", "0-d"])
def test_tensors_that_are_not_packed_matrices(layout):
    base = torch.randn(64, 96)
    x = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(30, 96),
        "3-d": base.view(4, 16, 96),
        "0-d": base[0, 0],
    }[layout]
    check(x, E4M3FN)
    if layout != "0-d":
        check(x, E4M3FN, granularity=PerRow())


def test_nothing_depends_on_the_number_of_threads():
    x = torch.randn(300, 5000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for granularity in (PerTensor(), PerRow(), PerBlock(128, 128)):
                room = torch.empty(x.numel())
                q = quantize(x, E4M3FN, granularity=granularity, axis=0, values=room)
                results.append((q.codes.view(torch.uint8), q.scale_inv, q.stats, q.values))
    finally:
        torch.set_num_threads(before)
    for first, other in zip(results[:3] * 2, results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_input_is_left_alone_and_outputs_share_no_memory():
    x = torch.randn(3, 2000)
    before = x.clone()
    first, second = (quantize(x, E4M3FN, values=torch.empty(6000)) for _ in range(2))
    assert first.values is not None
    assert second.values is not None
    first.values.zero_()
    first.codes.view(torch.uint8).zero_()
    assert torch.equal(x, before)
    assert same_bits(second.values, dequantize(second))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_is_decoded(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{fmt.name}"))
    for scale_inv in (1.0, 0.3, 1e38):
        assert same_bits(cpu.decode(codes, fmt, torch.tensor(scale_inv)), codes.float() * scale_inv)


def test_without_numba_casts_are_plain_and_say_so_once():
    code = (
        "import sys, warnings; sys.modules['numba'] = None\n"
        "import torch, unclamp\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    q = [unclamp.quantize(torch.ones(3), unclamp.E4M3FN) for _ in range(3)]\n"
        "assert [str(w.message)[:24] for w in seen] == ['casts on the CPU run in '], seen\n"
        "assert q[0].codes.float().tolist() == [448] * 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scales_of_other_dtypes_and_beyond_the_range_are_as_in_plain_torch():
    x = torch.randn(70)
    for scale in (torch.tensor(0.1, dtype=torch.float64), torch.tensor(3.0, requires_grad=True)):
        check(x, E4M3FN, scale, guard=True)
    for value in (1e-42, float("inf"), float("nan")):
        got, want = (f(x, E4M3FN, torch.tensor(value)) for f in (quantize, quantize_plain))
        assert same_bits(got.scale_inv, want.scale_inv)


def test_zeros_under_an_infinite_scale_are_nan():
    x = torch.tensor([0.0, 1.0, -0.0, -2.0]).repeat(1000)
    got = quantize(x, E4M3FN, torch.tensor(torch.inf)).codes.float()
    assert got[:4].isnan().tolist() == [True, False, True, False]
    assert got[1::2].tolist() == [448.0, -448.0] * 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_casts_too():
    code = (
        "import os, torch, unclamp\n"
        "x = torch.ones(3_000_000)\n"
        "torch.set_num_threads(2)\n"
        "unclamp.quantize(x, unclamp.E4M3FN)\n"
        "torch.set_num_threads(1)\n"
        "y = torch.ones(3_000_000)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    from unclamp.numerics.compiled import run\n"
        "    torch.get_num_threads = lambda: 2\n"
        "    run([(int, 1), (int, 2)])\n"
        "    os._exit(7)\n"
        "assert os.waitpid(child, 0)[1] == 7 * 256\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


CHECKED = """
import torch
from unclamp import E4M3FN, MX, PerBlock, PerRow, PerTensor, quantize
from unclamp.numerics import inspect
for shape in ((5, 8), (1, 1), (3, 1), (7, 2000)):
    for granularity in (PerTensor(), PerRow(), PerBlock(1, 128), PerBlock(3, 5), MX()):
        for axis in (0, 1):
            x = torch.randn(shape)
            q = quantize(x, E4M3FN, granularity=granularity, axis=axis)
            inspect(x, q.codes, q.scale_inv, granularity=granularity, axis=axis)
"""


@pytest.mark.slow
def test_the_kernels_stay_within_their_arrays(tmp_path):
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", CHECKED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
