"""The way of a GPU, without one: kernels interpreted and compiled, and the rules of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import PATIENCE_S

from unclamp import E4M3FN, E4M3FNUZ, E5M2
from unclamp.numerics.gpu.gemm import GemmPlan, Given, has_fp8_gemm, plan_gemm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def interpreted(*arguments: str, name: str = "interpreted_gpu.py") -> None:
    pytest.importorskip("triton")
    file = str(HERE / name)
    run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", file, *arguments,
        TRITON_INTERPRET="1")  # fmt: skip


def test_kernels_interpreted_equal_the_cpu():
    interpreted("-m", "not slow", "-k", "test_tensor or test_blocks or test_layer")


@pytest.mark.parametrize(
    "group", ["test_launches", "test_host", "test_alone or test_slots", "test_scratch"]
)
def test_launches_and_looks_of_the_host_are_counted(group):
    interpreted("-k", group, name="interpreted_launches.py")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["test_tensor", "test_blocks"])
def test_kernels_interpreted_equal_the_cpu_on_every_input(group):
    interpreted("-m", "slow", "-k", group)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "hip"])
def test_kernels_compile_for_a_device_that_is_not_here(target):
    pytest.importorskip("triton")
    run(str(HERE / "compiled_gpu.py"), target, TRITON_INTERPRET="0")


def test_launches_past_tritons_launcher_are_those_that_it_would_make():
    pytest.importorskip("triton")
    run(str(HERE / "compiled_gpu.py"), "direct", TRITON_INTERPRET="0")


def plan(a: Given, b: Given, n: int = 256, k: int = 512, arch: str = "sm_90") -> GemmPlan:
    return plan_gemm(a, b, m=100, n=n, k=k, arch=arch)


def given(format: str | None, granularity: str | None = "tensor") -> Given:
    return Given(format, granularity)


E4, E5 = given("e4m3fn"), given("e5m2")


@pytest.mark.parametrize("pair", [(E4, E4), (E5, E4), (E4, E5)])
def test_mixed_formats_are_multiplied_as_they_are(pair):
    assert plan(*pair) == GemmPlan(route="tensor")


@pytest.mark.parametrize(
    ("a", "b", "arch", "reason"),
    [
        (E5, E5, "sm_90", "no device multiplies e5m2 by e5m2"),
        (E4, E4, "sm_80", "sm_80 has no FP8 tensor cores"),
        (E4, given(None, None), "sm_90", "high precision"),
        (given("e4m3fn", "row"), given("e5m2", "row"), "sm_90", "e5m2 as the first"),
        (given("e4m3fn", "mx"), given("e4m3fn", "mx"), "sm_90", "no scales of mx"),
        (given("e4m3fn", "1x128"), given("e4m3fn", "128x128"), "sm_100", "sm_90 alone"),
        (given("e4m3fn", "128x128"), given("e4m3fn", "128x128"), "sm_90", "the other"),
    ],
)
def test_what_a_device_lacks_is_dequantised_and_said(a, b, arch, reason):
    got = plan(a, b, arch=arch)
    assert got.route == "dequantised"
    assert got.why is not None
    assert reason in got.why


def test_sizes_are_padded_to_sixteen():
    assert plan(E4, E4, n=24, k=100) == GemmPlan(route="tensor", pad_n=8, pad_k=12)
    assert plan(E4, given("e4m3fn", "row")).route == "row"


def test_blocks_of_128_want_whole_blocks():
    pair = (given("e4m3fn", "1x128"), given("e4m3fn", "128x128"))
    assert plan(*pair).route == "block"
    assert plan(*pair, k=500).why is not None


def test_blocks_of_another_format_than_e4m3fn_are_dequantised():
    """An H200 refuses them: torch's recipe of blocks wants both operands in e4m3fn."""
    for grain in ("1x128", "128x128"):
        found = plan(given("e5m2", "1x128"), given("e4m3fn", grain))
        assert found.route == "dequantised"
        assert found.why is not None
        assert "e5m2" in found.why


def test_devices_with_fp8_tensor_cores():
    devices = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950"]
    assert [has_fp8_gemm(d) for d in devices] == [False, False, *[True] * 3, False, True, True]


def test_rounding_is_left_to_devices_that_round_to_nearest_even():
    pytest.importorskip("triton")
    from unclamp.numerics.gpu.cast import rounds_natively

    assert rounds_natively(E4M3FN, "sm_90")
    assert rounds_natively(E5M2, "sm_89")
    assert not rounds_natively(E4M3FN, "sm_80")
    assert not rounds_natively(E4M3FNUZ, "sm_90")
    assert not rounds_natively(E4M3FN, "gfx942")


def test_importing_unclamp_does_not_import_triton_kernels():
    code = (
        "import sys, torch, unclamp; unclamp.quantize(torch.ones(4), unclamp.E4M3FN);"
        "sys.exit(any(name.startswith('unclamp.numerics.gpu.cast') for name in sys.modules))"
    )
    run("-c", code)


def test_turned_codes_are_a_copy_where_there_is_no_gpu():
    from unclamp.numerics import quantize

    q = quantize(torch.randn(6, 10), E4M3FN, turned=True)
    assert q.turned is not None
    assert q.turned.t().is_contiguous()
    assert torch.equal(q.turned.contiguous().view(torch.uint8), q.codes.view(torch.uint8))


def test_the_operator_quantize_turned_is_what_its_fake_says():
    from unclamp.numerics import CastPlan
    from unclamp.numerics.operators import LIBRARY

    assert LIBRARY.ns == "unclamp"
    x = torch.randn(6, 10)
    made = torch.ops.unclamp.quantize_turned(x, None, *CastPlan(format=E4M3FN).signature, 1)
    assert made[4].shape == (10, 6)
    assert torch.equal(made[4].t().contiguous().view(torch.uint8), made[0].view(torch.uint8))
    torch.library.opcheck(
        torch.ops.unclamp.quantize_turned.default,
        (x, None, *CastPlan(format=E4M3FN).signature, 1),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_bench_says_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--check"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


ALONE = """
import re, runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import distribution
wanted, queue = set(), ["torch", "triton", "numpy", "numba"]
while queue:
    name = queue.pop().lower().replace("_", "-")
    if name not in wanted:
        try:
            asked = distribution(name).requires or []
        except Exception:
            continue
        wanted.add(name)
        queue += [re.match(r"[\\w.-]+", each)[0] for each in asked if "extra ==" not in each]
mine = {"unclamp", "bench", "torchgen", "functorch"} | {name.replace("-", "_") for name in wanted}
class OnlyThese:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        is_known = top in mine or top in sys.stdlib_module_names or top.startswith("_")
        return PathFinder.find_spec(name, path, target) if is_known else None
sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyThese
sys.argv = ["bench/gpu.py", *sys.argv[1:]]
sys.path.insert(0, "bench")
runpy.run_path("bench/gpu.py", run_name="__main__")
"""


def dry_run(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run the bench where only torch, triton, numpy, numba and what they require are found."""
    pytest.importorskip("triton")
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "--dry-run", "--out", str(out), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "1",
             "UNCLAMP_DEVICE_PATH": "interpreter"},
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "UnclampWarning" not in done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_bench_wants_torch_triton_numpy_and_numba_alone(tmp_path):
    parts = ("ceilings", "ledger", "recorder", "study")
    printed, found = dry_run(tmp_path, *(word for part in parts for word in ("--only", part)))
    assert not found["errors"]
    assert found["figures"]["ledger update, 1,680 sites"]["value"] > 0
    assert set(found["left_out"]) == {"recorder", "study"}
    assert found["left_out"]["recorder"] == "needs pyarrow and duckdb"
    table = printed[printed.index("| what |") :].splitlines()
    assert table[1] == "|---|---|---|---|"
    assert all(row.count("|") == 5 for row in table[: table.index("")])
    assert "Left out: recorder (needs pyarrow and duckdb)" in printed


def test_the_bench_says_what_it_had_no_time_for(tmp_path):
    printed, found = dry_run(tmp_path, "--only", "ledger", "--only", "casts", "--seconds", "0")
    assert set(found["left_out"]) == {"ledger", "casts"}
    assert not found["figures"]
    assert "0 s left" in printed


@pytest.mark.slow
def test_the_whole_bench_runs_dry(tmp_path):
    _, found = dry_run(
        tmp_path, "--seconds", "3000", *(["--only", "casts", "--only", "whole", "--only", "linear"])
    )
    assert not found["errors"]
    assert found["figures"]["graph: tensors that differ from eager"]["value"] == 0
