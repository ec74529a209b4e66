"""What is proved of each trainer: the table of docs/trainers.md, made by running its tests.

A test says by `@pytest.mark.cell(trainer, property)` what it proves. `python -m bench.trainers`
runs tests/integrations and prints the table: "yes" where all tests of a cell passed, "no" where
one failed, the reason where the trainer is not installed, and "-" where nothing is claimed.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests" / "integrations"
COLUMNS = (
    "updates once a step",
    "loss as its own log",
    "resume bit for bit",
    "save format clean",
    "compile",
    "accumulation",
    "exception",
)
ROWS: dict[str, tuple[str, ...]] = {
    "Trainer": ("transformers", "accelerate"),
    "TRL SFT": ("trl",),
    "TRL DPO": ("trl",),
    "PEFT": ("peft",),
    "Accelerate": ("accelerate",),
    "Lightning": ("lightning",),
    "Fabric": ("lightning",),
    "torchtitan": ("torchtitan",),
    "Transformer Engine": (),
    "torchao": ("torchao",),
}
"""Trainers, and the packages whose versions stand beside the name."""
NOTHING = "-"
Cell = tuple[str, str]


@dataclass
class Outcomes:
    """A pytest plugin that remembers what became of the tests of each cell."""

    found: dict[Cell, list[str]] = field(default_factory=dict)
    _cells: dict[str, list[Cell]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Learn which test is of which cells, and leave the others out."""
        for item in items:
            cells = [mark.args for mark in item.iter_markers("cell")]
            self._cells[item.nodeid] = [(str(row), str(column)) for row, column in cells]
        items[:] = [item for item in items if self._cells[item.nodeid]]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's outcome: of its call, or of what ended it before."""
        if report.when == "call" or report.outcome != "passed":
            for cell in self._cells.get(report.nodeid, ()):
                self.found.setdefault(cell, []).append(report.outcome)

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> None:
        """Refuse cells that the table does not have."""
        cells = {cell for item in items for cell in self._cells[item.nodeid]}
        unknown = sorted(c for c in cells if c[0] not in ROWS or c[1] not in COLUMNS)
        if unknown:
            raise pytest.UsageError(f"no such cells in the table: {unknown}")


def word(outcomes: Iterable[str]) -> str:
    """Return what a cell says of its tests' outcomes."""
    seen = set(outcomes)
    if "failed" in seen:
        return "no"
    return "yes" if "passed" in seen else "not tried" if seen else NOTHING


def table(found: Mapping[Cell, Iterable[str]]) -> list[str]:
    """Return the lines of the table, in Markdown."""
    lines = [f"| trainer | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for row in ROWS:
        cells = [word(found.get((row, column), ())) for column in COLUMNS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def versions() -> str:
    """Return the versions of what was tried."""
    names = dict.fromkeys(["torch", *(name for packages in ROWS.values() for name in packages)])
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "(not installed)"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and print the table; 0 where none failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.trainers")
    parser.parse_args(arguments)
    outcomes, began = Outcomes(), time.perf_counter()
    options = [str(TESTS), "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    code = pytest.main(options, plugins=[outcomes])
    print(f"\n{versions()}; {time.perf_counter() - began:.0f} s\n")
    print("\n".join(table(outcomes.found)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
