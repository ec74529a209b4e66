"""Where compiled kernels are kept if neither our folder nor the home can be written.

Root may write whatever permissions say, so a folder that cannot be written has a file in its place.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unclamp
from patience import PATIENCE_S

ONE = """
import numpy as np
from numba.core import config
from unclamp.numerics import compiled, whole

before = config.CACHE_DIR
compiled.announce()
assert whole.own_scale(np.float32(2), np.float32(448), False) == 224
assert config.CACHE_DIR == before
print(sum(whole.own_scale.stats.cache_hits.values()), whole.own_scale.stats.cache_path)
"""
"""Compiles or loads one small kernel, and says whether and where it is kept."""
MESSAGE = "compiling the CPU kernels"


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our source whose kernels' folder, and a home, that cannot be written."""
    folder = tmp_path_factory.mktemp("read_only")
    source = Path(unclamp.__file__).parent
    shutil.copytree(source, folder / "unclamp", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "unclamp" / "numerics" / "__pycache__").touch()
    (folder / "home").touch()
    return folder


def one(read_only: Path, temporary: Path, **environment: str) -> tuple[str, str, str]:
    """Return from a process of its own: kernels loaded, the folder of the cache, stderr."""
    environ = {
        k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    }
    environ |= {"HOME": str(read_only / "home"), "PYTHONPATH": str(read_only),
                "TMPDIR": str(temporary), **environment}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE], env=environ, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hits, _, folder = done.stdout.strip().partition(" ")
    return hits, folder, done.stderr


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders of users are told by their ids")
def test_kernels_are_kept_in_a_folder_of_the_users(read_only: Path, tmp_path: Path) -> None:
    """And compiled once: a container whose image and home are read-only starts as fast as any."""
    ours = tmp_path / f"unclamp-{os.getuid()}"
    hits, folder, said = one(read_only, tmp_path)
    assert (hits, Path(folder).parent) == ("0", ours)
    assert ours.stat().st_mode & 0o777 == 0o700
    assert said.count(MESSAGE) == 1
    assert f"they are kept in {ours}" in said
    hits, again, said = one(read_only, tmp_path, NUMBA_CACHE_DIR=str(read_only / "home"))
    assert (hits, again) == ("1", folder)  # though this named one that cannot be written
    assert MESSAGE not in said


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders of users are told by their ids")
def test_a_folder_that_others_may_write_is_not_loaded_from(read_only: Path, tmp_path: Path) -> None:
    """What lies in it would be run."""
    (tmp_path / f"unclamp-{os.getuid()}").mkdir(mode=0o700)
    (tmp_path / f"unclamp-{os.getuid()}").chmod(0o777)
    hits, folder, said = one(read_only, tmp_path)
    assert (hits, folder) == ("0", "None")
    assert "for this process: no folder to keep them" in said


CALLED = """
import torch
from unclamp.formats import E4M3FN
from unclamp.numerics import quantize, whole

q = quantize(torch.tensor([1e-9, 1.0]), E4M3FN, torch.tensor(1.0))
print(sum(whole.cast_at.stats.cache_hits.values()), [int(count) for count in q.stats[3:6]])
"""
"""Casts with a kernel that calls others, and says whether it was kept, and what it counted."""


def test_a_kept_kernel_is_compiled_anew_when_one_that_it_calls_has_changed(tmp_path: Path) -> None:
    """An upgrade leaves the cache where it is; numba looks at the file of the outer kernel only."""
    source = Path(unclamp.__file__).parent
    shutil.copytree(source, tmp_path / "unclamp", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environ["PYTHONPATH"] = str(tmp_path)

    def said() -> str:
        done = subprocess.run(
            [sys.executable, "-c", CALLED], env=environ, capture_output=True, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said() == "0 [0, 1, 0]"
    assert said() == "1 [0, 1, 0]"
    kernels = tmp_path / "unclamp" / "numerics" / "kernels.py"
    text, before = kernels.read_text(), "counts[UNDERFLOWED] += _vanished("
    assert text.count(before) == 1
    kernels.write_text(text.replace(before, "counts[UNDERFLOWED] += 7 * _vanished("))
    assert said() == "0 [0, 7, 0]"


LOADED = """
from unclamp.numerics import compiled, cpu

try:
    with compiled.only_loading():
        cpu.warm_up()
    print("loaded")
except compiled.NotKept:
    print("not kept")
"""


def test_who_only_loads_compiles_nothing(tmp_path: Path) -> None:
    def said(code: str) -> str:
        environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said(LOADED) == "not kept"
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".nbi"]
    said(CALLED)
    assert said(LOADED) == "loaded"
