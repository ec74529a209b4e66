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
import sys
from unclamp.numerics import compiled, whole

with compiled.announced():
    whole.merge_at(0, 0, (1,)[:0]) if False else None
    kernel = compiled.compiled(whole._sample) if hasattr(whole, "_sample") else whole.whole
print(kernel.stats.cache_path)
"""


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our source whose kernels' folder, and a home, that cannot be written."""
    folder = tmp_path_factory.mktemp("read_only")
    source = Path(unclamp.__file__).parent
    shutil.copytree(source, folder / "unclamp", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "unclamp" / "numerics" / "__pycache__").touch()
    (folder / "home").touch()
    return folder
