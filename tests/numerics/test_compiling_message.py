"""A user is told of a compilation that happens, and of none that does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unclamp

MESSAGE = "compiling the CPU kernels"
CAST = "import torch, unclamp; unclamp.quantize(torch.ones(4, 4), unclamp.E4M3FN)\n"
# Loading takes longer than a message that goes by the clock would wait.
SLOWLY = """
import time
from numba.core.caching import FunctionCache
load, waited = FunctionCache.load_overload, []
def late(*args, **kwargs):
    if not waited:
        waited.append(True)
        time.sleep(2)
    return load(*args, **kwargs)
FunctionCache.load_overload = late
"""
# A function of somebody else is compiled while ours are loaded.
BESIDE = """
import numba
from unclamp.numerics import cpu
load = cpu.warm_up
cpu.warm_up = lambda: (numba.njit(lambda x: x + 1)(1), load())
"""


def stderr_of(code: str, cache: Path, **environment: str) -> str:
    environ = os.environ | {"NUMBA_CACHE_DIR": str(cache)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environ
    )
    return done.stderr


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache that a first process has filled, and what that process said."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, stderr_of(CAST, cache)


def test_who_compiles_says_so_and_who_loads_says_nothing(tmp_path: Path) -> None:
    """Whoever compiles is not waited for, and what is loaded is what other tests have compiled."""
    environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", CAST], stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        process.kill()
    assert MESSAGE in said
    assert "kept on disk" in said
    unclamp.quantize(torch.ones(4, 4), unclamp.E4M3FN)  # compiles where no test has
    loads = subprocess.run([sys.executable, "-c", CAST], check=True, capture_output=True, text=True)
    assert MESSAGE not in loads.stderr


@pytest.mark.slow
def test_who_compiles_says_so_once_and_who_loads_says_nothing(filled: tuple[Path, str]) -> None:
    cache, first = filled
    assert first.count(MESSAGE) == 1
    assert "kept on disk" in first
    assert MESSAGE not in stderr_of(CAST, cache)


@pytest.mark.slow
@pytest.mark.parametrize("before", [SLOWLY, BESIDE], ids=["slow", "beside"])
def test_a_process_that_loads_says_nothing(filled: tuple[Path, str], before: str) -> None:
    assert MESSAGE not in stderr_of(before + CAST, filled[0])


@pytest.mark.slow
def test_one_kernel_that_is_missing_from_the_cache_is_said(
    filled: tuple[Path, str], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(filled[0], tmp_path / "cache"))
    (index,) = cache.rglob("whole.cast_at*.nbi")
    index.unlink()
    assert stderr_of(CAST, cache).count(MESSAGE) == 1
    assert MESSAGE not in stderr_of(CAST, cache)


@pytest.mark.slow
def test_without_a_compiler_nothing_is_said(tmp_path: Path) -> None:
    assert MESSAGE not in stderr_of(CAST, tmp_path, NUMBA_DISABLE_JIT="1")


@pytest.mark.slow
def test_a_kernel_that_is_compiled_later_is_said(filled: tuple[Path, str], tmp_path: Path) -> None:
    """Not every user casts blocks, so nobody waits for that kernel before."""
    cache = Path(shutil.copytree(filled[0], tmp_path / "cache"))
    assert not list(cache.rglob("tiles.cast_tiles*.nbi"))
    blocks = CAST.replace(")\n", ", granularity=unclamp.MX())\n")
    assert stderr_of(blocks, cache).count(MESSAGE) == 1
    assert MESSAGE not in stderr_of(blocks, cache)


def test_the_probe_of_numba_by_the_doctor_is_no_kernel(tmp_path: Path) -> None:
    announce = "from unclamp.numerics import compiled; compiled.announce()\n"
    probe = "from unclamp.doctor.device import accumulation; accumulation()\n"
    assert MESSAGE not in stderr_of(announce + probe, tmp_path)
