"""The examples of the documentation run, and print what it says they print."""

import contextlib
import doctest
import importlib
import io
import re
import warnings
from pathlib import Path

import pytest

from unclamp.scaling import SCALINGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = ROOT / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted((SOURCE / "unclamp").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)


PLACEHOLDER = re.compile(
    r"@@|\b(?:TODO|TBD|FIXME|XXX|PLACEHOLDER)\b|^\s*\{\{?\w+\}?\}\s*$", re.MULTILINE
)
"""What a text that a number or table was to replace looks like."""


def examples() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for number, match in enumerate(EXAMPLE.finditer(page.read_text(encoding="utf-8"))):
            found.append((f"{page.name}-{number}", match[1], match[2] or ""))
    return found


@pytest.mark.parametrize(("name", "code", "expected"), examples(), ids=lambda v: v[:24])
def test_an_example_prints_what_the_page_says(name, code, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A reader has no scalings but ours; other tests' and other examples' count as known kinds.
    for kind, scaling in list(SCALINGS.items()):
        if not scaling.__module__.startswith("unclamp."):
            monkeypatch.delitem(SCALINGS, kind)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        # In torchao's sources, which transformers imports if they are there.
        warnings.filterwarnings("ignore", message="invalid escape sequence")
        exec(compile(code, name, "exec"), {"__name__": "example"})
    if expected:
        assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_placeholder_left(page):
    assert PLACEHOLDER.findall(page.read_text(encoding="utf-8")) == []


def test_the_pages_have_examples():
    assert len(examples()) >= 10


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_docstrings_run(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctest.testmod(importlib.import_module(module)).failed == 0
