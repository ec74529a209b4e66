"""Who asks a benchmark for help starts none."""

import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_S

ROOT = Path(__file__).parent.parent
RUN_BY_THEMSELVES = [
    path for path in sorted((ROOT / "bench").glob("*.py")) if "__main__" in path.read_text()
]


@pytest.mark.parametrize("module", ["bench", "bench.association"])
def test_help_is_printed_and_nothing_is_measured(module: str) -> None:
    results = ROOT / "bench" / "results.json"
    before = results.stat().st_mtime_ns if results.exists() else None
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module}")
    assert (results.stat().st_mtime_ns if results.exists() else None) == before


@pytest.mark.parametrize("path", RUN_BY_THEMSELVES, ids=lambda path: path.stem)
def test_every_benchmark_that_runs_by_itself_reads_its_command_line(path: Path) -> None:
    assert "argparse.ArgumentParser(" in path.read_text()
