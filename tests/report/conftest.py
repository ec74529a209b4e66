"""The planted run, written once."""

from pathlib import Path

import pytest

from truths.runs import write_planted


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "run <&> 1", scenario="outlier")
