"""A GEMM by panels gives the bits of the one that decodes its operands whole, in little memory."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patience import PATIENCE_S
from unclamp import E4M3FN, FORMATS
from unclamp.numerics import GemmOperand, compiled, matmul, panels, plain_operand, quantize
from unclamp.numerics.compiled import limits
from unclamp.scaling import MX, Granularity, PerBlock, PerRow, PerTensor

GRANULARITIES = (PerTensor(), PerRow(), PerBlock(1, 128), PerBlock(128, 128), PerBlock(3, 5), MX())
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
each_axis = pytest.mark.parametrize("axis", [0, 1])
ROWS, OTHERS, CONTRACTED = 330, 700, 160


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut these matrices into several panels, each of a size that a BLAS has no exception for."""
    monkeypatch.setattr(panels, "ONE_PANEL", 1)
    monkeypatch.setattr(panels, "OUTER", 128 * CONTRACTED)
    monkeypatch.setattr(panels, "INNER", 128 * CONTRACTED)


def operand(
    rows: int, granularity: Granularity, axis: int, seed: int = 0
) -> tuple[GemmOperand, Tensor]:
    """Return an operand, and what it decodes to by torch's own conversion, `[rows, contracted]`."""
    torch.manual_seed(seed)
    x = torch.randn((rows, CONTRACTED) if axis else (CONTRACTED, rows))
    q = quantize(x, E4M3FN, granularity=granularity, axis=axis)
    values = q.codes.to(torch.float32) if axis else q.codes.to(torch.float32).t()
    scales = q.scale_inv.reshape(1, 1) if q.scale_inv.ndim == 0 else q.scale_inv
    across, along = granularity.block
    i = torch.arange(rows) // (across or rows)
    j = torch.arange(CONTRACTED) // (along or CONTRACTED)
    hat = (values * scales[i][:, j]).contiguous()
    return GemmOperand(q.codes, q.scale_inv, granularity, axis), hat


def laid_as(hat: Tensor, axis: int) -> Tensor:
    """Return the same matrix in the memory of an operand along this axis."""
    return hat if axis else hat.t().contiguous().t()


@each_granularity
@each_axis
@pytest.mark.parametrize("other_axis", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_panels_give_the_bits_of_one_product(granularity, axis, other_axis, with_bias):
    a, a_hat = operand(ROWS, granularity, axis)
    b, b_hat = operand(OTHERS, granularity, other_axis, seed=1)
    bias = torch.randn(OTHERS) if with_bias else None
    want = F.linear(laid_as(a_hat, axis), laid_as(b_hat, other_axis), bias)
    assert torch.equal(matmul(a, b, bias), want)
    out = torch.full_like(want, torch.nan)
    assert matmul(a, b, bias, out=out, scratch=torch.empty(b_hat.numel())) is out
    assert torch.equal(out, want)


def test_no_panel_has_a_few_rows_only():
    codes = torch.zeros(1500, CONTRACTED, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for rows in range(129, 1500):
        found = panels._panels(
            GemmOperand(codes[:rows], torch.ones(()), PerTensor()), 128 * CONTRACTED
        )
        assert len(found.firsts) > 1
        assert rows - found.firsts[-1] >= 32


FEW = """
import torch
from unclamp import E4M3FN
from unclamp.numerics import matmul, panels, quantize

torch.set_num_threads(2)
panels.ONE_PANEL, panels.OUTER, panels.INNER = 1, 2**16, 2**16
for rows in (1, 15, 16, 17, 20, 31, 32, 33, 48):
    x, weight = (quantize(torch.randn(size, 128), E4M3FN) for size in (rows, 700))
    found = matmul(x.along(1), weight.along(1), scratch=torch.empty(700 * 128))
    inv = x.scale_inv * weight.scale_inv
    want = x.codes.to(torch.float64) @ weight.codes.to(torch.float64).t() * inv
    torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-3)
"""


def test_few_rows_that_go_by_a_whole_operand_are_not_cut_for_ever():
    """As in the step of a large layer on a few tokens. A process, which a loop cannot hold up."""
    command = [sys.executable, "-c", FEW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_the_matrix_is_cut_into_panels():
    a, b = (operand(rows, PerTensor(), 1)[0] for rows in (ROWS, OTHERS))
    way = panels._way(a, b, None)
    assert not way.a_is_outer  # the larger one is
    assert len(way.outer.firsts) == 6
    assert len(way.inner.firsts) >= 3
    assert way.outer.rows % way.outer.step >= 32
    assert way.inner.rows % way.inner.step >= 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_result_of_half_precision_is_rounded_once(dtype):
    (a, a_hat), (b, b_hat) = operand(ROWS, PerTensor(), 1), operand(OTHERS, PerTensor(), 1)
    want = F.linear(a_hat, b_hat).to(dtype)
    assert torch.equal(matmul(a, b, out_dtype=dtype), want)
    out = torch.empty(OTHERS, ROWS, dtype=dtype).t()  # columns, which a BLAS does not write
    assert torch.equal(matmul(a, b, out_dtype=dtype, out=out), want)


def test_one_operand_may_be_in_high_precision_and_want_a_gradient():
    a, a_hat = operand(ROWS, PerTensor(), 1)
    b = torch.randn(OTHERS, CONTRACTED, requires_grad=True)
    want = F.linear(a_hat, b.detach())
    assert torch.equal(matmul(a, plain_operand(b)), want)
    assert torch.equal(matmul(plain_operand(b), a), F.linear(b.detach(), a_hat))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@each_axis
def test_every_code_decodes_as_torch_decodes_it(fmt, axis):
    dtype = getattr(torch, f"float8_{fmt.name}")
    codes = torch.arange(256, dtype=torch.uint8).repeat(130, 1).view(dtype)
    codes = codes if axis else codes.view(torch.uint8).t().contiguous().view(dtype)
    inv = torch.tensor(0.37)
    some = panels._panels(GemmOperand(codes, inv, PerTensor(), axis), 1)
    found = some.at(0, torch.empty(some.size))
    want = codes.to(torch.float32) * inv
    want = (want if axis else want.t())[: len(found)]
    assert torch.equal(found.isnan(), want.isnan())
    is_number = ~want.isnan()
    assert torch.equal(found[is_number].view(torch.int32), want[is_number].view(torch.int32))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Have torch use two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_mkl = pytest.mark.skipif(limits() is None, reason="a BLAS that cannot be kept to one thread")


@needs_mkl
def test_each_thread_takes_panels_and_the_sums_are_those_of_one(two_threads):
    (a, a_hat), (b, b_hat) = operand(ROWS, PerTensor(), 1), operand(OTHERS, PerTensor(), 0, 1)
    bias = torch.randn(OTHERS, requires_grad=True)
    assert panels._way(a, b, None).threads == 2
    found = matmul(a, b, bias)
    assert torch.equal(found, F.linear(a_hat, laid_as(b_hat, 0), bias.detach()))
    torch.set_num_threads(1)
    assert panels._way(a, b, None).threads == 1
    assert torch.equal(matmul(a, b, bias), found)


@needs_mkl
def test_threads_of_panels_compute_alone_and_the_callers_keep_their_number(two_threads):
    a, b = (operand(rows, PerTensor(), 1)[0] for rows in (ROWS, OTHERS))
    matmul(a, b)
    assert compiled.run([(torch.get_num_threads,)] * 2) == [1, 1]
    with ThreadPoolExecutor(1) as others:
        assert others.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


NESTED = """
import threading, torch
from unclamp.numerics import compiled

torch.get_num_threads = lambda: 2  # as where OpenMP's number is not the one that torch takes

def inner():
    return threading.get_ident()

def outer():
    return compiled.run([(inner,)] * 2) == [threading.get_ident()] * 2

assert compiled.run([(outer,)] * 4) == [True] * 4
"""


def test_calls_of_a_pools_thread_do_not_wait_for_the_pool():
    command = [sys.executable, "-c", NESTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_panels_serve_in_inference_mode(two_threads):
    (a, a_hat), (b, b_hat) = operand(ROWS, PerTensor(), 1), operand(OTHERS, PerTensor(), 1)
    with torch.inference_mode():
        assert torch.equal(matmul(a, b), F.linear(a_hat, b_hat))
        out = torch.empty(ROWS, OTHERS, dtype=torch.bfloat16)
        assert torch.equal(
            matmul(a, b, out_dtype=out.dtype, out=out), (a_hat @ b_hat.t()).bfloat16()
        )
    assert torch.equal(matmul(a, b), F.linear(a_hat, b_hat))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_output_that_wants_gradients_is_written_without_them(two_threads, threads: int):
    """As torch's own products do it, of a parameter for instance."""
    torch.set_num_threads(threads)
    (a, a_hat), (b, b_hat) = operand(ROWS, PerTensor(), 1), operand(OTHERS, PerTensor(), 1)
    out = torch.zeros(ROWS, OTHERS, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(matmul(a, b, out=out), F.linear(a_hat, b_hat))
    with pytest.raises(RuntimeError, match="requires grad"):
        matmul(a, b, out=out)


def test_a_counter_of_flops_sees_the_products_of_panels(two_threads):
    a, b = (operand(rows, PerTensor(), 1)[0] for rows in (ROWS, OTHERS))
    with FlopCounterMode(display=False) as counter:
        matmul(a, b)
    assert counter.get_total_flops() == 2 * ROWS * OTHERS * CONTRACTED


def test_several_callers_at_a_time_get_what_each_gets_alone(two_threads):
    pairs = [
        (operand(ROWS, PerTensor(), 1, s)[0], operand(OTHERS, PerRow(), 1, s)[0]) for s in range(4)
    ]
    want = [matmul(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            found = [callers.submit(matmul, *pair) for pair in pairs]
            for one, other in zip(found, want, strict=True):
                assert torch.equal(one.result(PATIENCE_S), other)


def test_a_contracted_axis_of_another_length_is_an_error():
    a, _ = operand(ROWS, PerTensor(), 1)
    with pytest.raises(RuntimeError):
        matmul(a, a._replace(axis=0))


STEP = """
import sys, torch, unclamp
from pathlib import Path
from torch import nn

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

unclamp.quantize(torch.ones(2), unclamp.E4M3FN)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1024, 4096))
if sys.argv[1] != "plain":
    unclamp.convert(model, unclamp.Recipe.uniform(getattr(unclamp, sys.argv[1])()))
x, grad = torch.randn(2048, 1024, requires_grad=True), torch.randn(2048, 4096)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for _ in range(2):
    model.zero_grad()
    x.grad = None
    model(x).backward(grad)
print(resident("VmHWM") - before)
"""


def peak_mib(kind: str) -> float:
    command = [sys.executable, "-c", STEP, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_a_step_by_panels_takes_little_more_memory_than_in_float32():
    """The output, 32 MiB, and the gradients, 24, are there in any case, and so is what BLAS packs.

    Beside them unclamp has codes of 14 MiB and panels of 12; whole operands in float32 would be 80.
    """
    assert peak_mib("Delayed") < 56 + 14 + 12 + 34
    assert peak_mib("plain") > 56


@each_axis
def test_scales_that_do_not_cover_the_matrix_are_refused(axis: int):
    a, _ = operand(ROWS, PerBlock(128, 128), axis)
    b, _ = operand(OTHERS, PerRow(), axis)
    assert a.scale_inv is not None
    less = a.scale_inv[:, :1] if axis else a.scale_inv[:1]
    with pytest.raises(ValueError, match="expected a scale for each block"):
        matmul(a._replace(scale_inv=less), b)


@each_granularity
def test_scales_of_another_dtype_are_those_numbers(granularity: Granularity):
    a, a_hat = operand(ROWS, granularity, 1)
    b, b_hat = operand(OTHERS, granularity, 1, seed=1)
    assert a.scale_inv is not None
    found = matmul(a._replace(scale_inv=a.scale_inv.double()), b)
    assert torch.equal(found, a_hat @ b_hat.t())
