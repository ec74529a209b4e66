"""The table of docs/trainers.md claims what tests prove, and nothing else."""

import re
from pathlib import Path

import pytest
from bench.trainers import COLUMNS, ROWS, table, word

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "trainers.md"


def marked_cells(items: list[pytest.Item]) -> set[tuple[str, str]]:
    """Return the cells that collected tests are marked with."""
    marks = [mark for item in items for mark in item.iter_markers("cell")]
    return {(str(mark.args[0]), str(mark.args[1])) for mark in marks}


def claimed_cells() -> dict[tuple[str, str], str]:
    """Return what the page's table says in each cell."""
    text = PAGE.read_text(encoding="utf-8")
    header = re.search(r"^\| trainer \|(.*)\|$", text, re.MULTILINE)
    assert header is not None
    columns = [cell.strip() for cell in header[1].split("|")]
    assert tuple(columns) == COLUMNS
    claims = {}
    for row in ROWS:
        line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", text, re.MULTILINE)
        assert line is not None, row
        for column, cell in zip(columns, line[1].split("|"), strict=True):
            claims[row, column] = cell.strip()
    return claims


def test_every_claim_has_a_test_and_every_test_a_claim(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if item.path.parent == HERE]
    if {item.path for item in items} != set(HERE.glob("test_*.py")):
        pytest.skip("not all tests of trainers were collected, or a trainer is not installed")
    claims = claimed_cells()
    assert {cell for cell, said in claims.items() if said == "yes"} == marked_cells(items)
    assert set(claims.values()) <= {"yes", "-"}


def test_a_cell_says_yes_only_if_all_its_tests_passed() -> None:
    assert [word(o) for o in (["passed", "failed"], ["passed", "skipped"], ["skipped"], [])] == [
        "no",
        "yes",
        "not tried",
        "-",
    ]


def test_the_table_has_a_line_for_each_trainer() -> None:
    lines = table({("Fabric", "compile"): ["passed"]})
    assert len(lines) == 2 + len(ROWS)
    (fabric,) = (line for line in lines if line.startswith("| Fabric |"))
    assert fabric == "| Fabric | - | - | - | - | yes | - | - |"
