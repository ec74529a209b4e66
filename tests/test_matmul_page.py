"""docs/matmul.md has the numbers that its bench measures, and the figures that its bench draws."""

import re
import xml.etree.ElementTree as ET
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from bench import matmul, matmul_diagrams
from bench.matmul_figures import draw
from bench.pictures import AMBER, BLUE, DARK, GREY, PAGE, PURPLE
from ml_dtypes import float8_e4m3fn

from unclamp.numerics.hopper import hopper_matmul

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "matmul.md").read_text(encoding="utf-8")
FIGURES = re.findall(r"^!\[(.+)\]\((matmul/.+\.svg)\)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return matmul.tables()


def test_every_table_stands_on_the_page_as_it_is_measured(tables):
    missing = [title for title, table in tables.items() if table not in TEXT]
    assert missing == []


def test_every_percentage_of_the_prose_is_in_a_table(tables):
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if line[:1] not in ("|", "!"))
    said = re.findall(r"[\d.]+ %", prose)
    assert len(said) >= 8
    cells = {cell for table in tables.values() for cell in re.findall(r"[\d.]+ %", table)}
    assert [one for one in said if one not in cells] == []


def test_what_the_page_concludes_is_so():
    by = {(e.data, e.k): e for e in matmul.by_length()}
    assert all(e.float32 < matmul.NOTHING for e in by.values())
    assert all(e.fast < e.cast for e in by.values() if e.data != "positive")
    assert [e.fast > e.cast for e in by.values() if e.data == "positive"] == [False] + 3 * [True]
    assert all(e.promoted < max(e.cast, 1e-3) for e in by.values())
    small = [o for o in matmul.by_outlier() if o.size <= 1000]
    errors = [v for o in small for lost in (o.token, o.channel) for v in lost.values()]
    assert max(errors) < 1.05 * min(errors)
    last = matmul.by_outlier()[-1].channel
    assert last["1x128 by 128x128"] ** 2 <= 127 / 4096
    assert last["MX"] ** 2 <= 31 / 4096


def test_errors_are_against_exact_products():
    """By rational arithmetic and another library's cast, on a few outputs."""
    generator = matmul.np.random.default_rng(0)
    a, b = (matmul.drawn("zero-mean", 2, 64, generator) for _ in range(2))
    exact, decoded = [], []
    for x in (a, b):
        scale = Fraction(float(torch.tensor(448.0) / x.abs().max()))
        cast = (x * float(scale)).numpy().astype(float8_e4m3fn).astype(float)
        exact.append([[Fraction(v) for v in row] for row in x.tolist()])
        decoded.append([[Fraction(v) / scale for v in row] for row in cast.tolist()])
    of = {}
    for name, (left, right) in {"exact": exact, "decoded": decoded}.items():
        of[name] = [sum(p * q for p, q in zip(r, s, strict=True)) for r in left for s in right]
    pairs = list(zip(of["decoded"], of["exact"], strict=True))
    expected = (sum((p - q) ** 2 for p, q in pairs) / sum(q**2 for _, q in pairs)) ** 0.5
    whole = matmul.PerTensor()
    found = matmul.exactly(matmul.decoded(a, whole), matmul.decoded(b, whole))
    assert matmul.error(found, matmul.exactly(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_the_diagram_adds_as_the_tensor_core_does():
    added = (*matmul_diagrams.ADDED, *[(0.0, 0.0)] * 28)
    a, b = (
        torch.tensor([[matmul_diagrams.BEFORE[n]] * 32 + [pair[n] for pair in added]])
        for n in range(2)
    )
    so_far, unit = Fraction(32 * 36), Fraction(1, 8)
    products = [Fraction(p) * Fraction(q) for p, q in added]
    cut = sum(floor(abs(p) / unit) * unit * (1 if p > 0 else -1) for p in products)
    assert hopper_matmul(a, b, fast=True).item() == so_far + cut
    texts = _texts(DOCS / "matmul" / "adding.svg")
    assert {str(so_far + cut), f"{float(so_far + sum(products)):.12g}"} <= set(texts)


def test_digits_are_those_of_the_value():
    assert matmul_diagrams.digits(8.9375, 4, -4) == "010001111"
    assert matmul_diagrams.digits(-0.34375, 0, -5) == "001011"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0374, "3.7 %"), (0.144, "14 %"), (0.00055, "0.055 %"), (0.9999, "100 %"),
     (1e-9, "< 0.0001 %"), (0.002, "0.2 %")],
)  # fmt: skip
def test_an_error_is_written_with_two_figures(share, text):
    assert matmul.percent(share) == text


def test_the_figures_are_those_that_the_bench_draws(tmp_path):
    """What they say is compared; coordinates may differ in the last digit."""
    drawn = draw(tmp_path)
    assert [f"matmul/{path.name}" for path in drawn] == [path for _, path in FIGURES]
    assert {path.name for path in (DOCS / "matmul").iterdir()} == {path.name for path in drawn}
    for path in drawn:
        assert _texts(path) == _texts(DOCS / "matmul" / path.name), path.name


@pytest.mark.parametrize("path", [path for _, path in FIGURES], ids=str)
def test_a_figure_is_small_has_both_themes_and_loads_nothing(path):
    svg = (DOCS / path).read_text(encoding="utf-8")
    assert len(svg) < 40_000
    assert "prefers-color-scheme:dark" in svg
    assert PAGE in svg.split("</style>")[0]
    body = svg.split("</style>", 1)[1]
    assert not any(colour in body for colour in DARK)  # each is a variable
    assert re.findall(r"(?:href|src)=\"(?!#)|url\((?!#)|<script|<image", body) == []
    assert svg.count("<title>") == 1


@pytest.mark.parametrize("colour", [BLUE, AMBER, GREY, PURPLE])
@pytest.mark.parametrize("ground", [PAGE, DARK[PAGE]], ids=["light", "dark"])
def test_colours_stand_out_from_either_ground(colour, ground):
    bright, dim = sorted((_luminance(colour), _luminance(ground)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 3


@pytest.mark.parametrize(("words", "path"), FIGURES, ids=[path for _, path in FIGURES])
def test_a_figure_is_described(words, path):
    assert len(words) > 40


def _luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _texts(path: Path) -> list[str]:
    tree = ET.fromstring(path.read_text(encoding="utf-8"))
    found = tree.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in found]
