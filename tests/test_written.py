"""How figures are written, and that the words of the tables are explained."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from truths.runs import write_planted
from unclamp import Recipe, convert, revert, switch
from unclamp.analysis.paired import paired_difference
from unclamp.errors import StudyError
from unclamp.formats import FORMATS
from unclamp.nn.unmatched import kept_note
from unclamp.report import build_view
from unclamp.report.glossary import GLOSSARY, term_of
from unclamp.report.html import write_page
from unclamp.report.status import study_notes
from unclamp.report.words import ARM_COLUMNS, SITE_COLUMNS, TABLE_COLUMNS, difference_cell
from unclamp.runlog.damage import DamagedPart
from unclamp.study.config import StudyConfig, default_toml
from unclamp.written import counted, loss_text, percent, signed, times


@pytest.mark.parametrize("power", range(5, 300, 7))
def test_large_figures_have_an_exponent_and_no_row_of_digits(power: int) -> None:
    value = float(f"1.9e{power}")
    for text in (times(value), loss_text(value), signed(value), signed(-value), percent(value)):
        assert len(text) <= 10
        assert "e+" not in text
        assert float(text.strip("x %")) == pytest.approx(
            -value if text.startswith("-") else value * (100 if "%" in text else 1), rel=0.03
        )


def test_figures_of_usual_size_are_as_they_were() -> None:
    assert (times(2.364), times(119.912, 1), loss_text(2.58211)) == ("2.36x", "119.9x", "2.5821")
    assert (signed(0.00412), signed(-0.021), signed(0.0)) == ("+0.00412", "-0.021", "0")
    assert [percent(share) for share in (0.0, 0.00974, 6.94e-8)] == ["0 %", "0.974 %", "6.94e-6 %"]
    for function in (times, loss_text, signed, percent):
        assert function(math.nan) == function(math.inf) == "not finite"


def test_one_of_a_thing_is_no_things() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 1e6)] == [
        "0 steps", "1 step", "2 steps", "1,000,000 steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "other", "cell"),
    [
        ([2.5, 2.61, 2.42], [2.4, 2.5, 2.33], "+0.1 (+0.0752 to +0.125) differs"),
        ([2.50, 2.61, 2.42], [2.51, 2.61, 2.43], "-0.00667 (-0.021 to +0.00768)"),
        ([2.5], [2.4], "+0.1 (one seed)"),
        ([2.5, 2.5], [2.5, 2.5], "equal"),
        ([2.5, math.nan], [2.5, 2.5], "not finite"),
    ],
)
def test_a_difference_has_its_interval_beside_it(
    own: list[float], other: list[float], cell: str
) -> None:
    assert difference_cell(paired_difference(own, other)) == cell


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_the_page_script_writes_numbers_by_the_same_rules() -> None:
    script = files("unclamp.report").joinpath("templates", "sites.js").read_text(encoding="utf-8")
    begin = script.index("const exponent"), script.index("const things")
    values = [0.0, 0.00002, 1.0, 2.361, 4711.0, 1.9e29, 2.5e120]
    program = (
        f"{script[begin[0] : begin[1]]} const values = {json.dumps(values)};"
        "console.log(JSON.stringify(values.map(v => [write.ratio(v), write.share(v / 100)])))"
    )
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    ratios = [ratio for ratio, _ in json.loads(done.stdout)]
    assert ratios == [times(value) for value in values]


def test_clamping_begins_where_the_glossary_says() -> None:
    """A rounding tie goes to even, so half a step above the largest value it may still fit."""
    (term,) = [term for term in GLOSSARY if term.word == "overshoot"]
    for name in ("e4m3fn", "e5m2"):
        fmt = FORMATS[name]
        said = re.search(rf"([\d.]+)x for {name}", term.meaning)
        assert said is not None
        assert float(said[1]) == pytest.approx(fmt.overflow_limit / fmt.max, abs=5e-3)


def test_every_heading_of_the_arm_table_is_explained() -> None:
    assert [column for column in ARM_COLUMNS if term_of(column) is None] == []
    explained = {column for column in SITE_COLUMNS if term_of(column)}
    assert {"site", "clamped elements", "clamped casts", "overshoot", "clamp error"} <= explained
    assert len({term.anchor for term in GLOSSARY}) == len(GLOSSARY)


def test_one_word_for_one_thing() -> None:
    """People read "clamped"; `saturated` is a column of the log."""
    shown = [*ARM_COLUMNS, *SITE_COLUMNS, *(part for row in TABLE_COLUMNS for part in row[1:])]
    shown += [term.word for term in GLOSSARY]
    assert [text for text in shown if re.search("saturat|overflow", text)] == []


def test_an_overshoot_is_shown_only_where_something_was_clamped(tmp_path: Path) -> None:
    view = build_view(write_planted(tmp_path / "run"))
    assert view.run is not None
    sites = {(site.fqn, site.role): site for site in view.run.sites}
    assert sites["model.layers.0.down", "input"].overshoot == 2.0
    assert sites["model.layers.0.down", "weight"].overshoot is None
    calm = build_view(write_planted(tmp_path / "calm", steps=20))
    assert calm.scenarios[0].arms[0].overshoot is None
    text = write_page(calm, tmp_path / "page.html").read_text()
    assert "2605.26189" not in text  # no caution about harm where nothing was clamped


def _one_step_study() -> str:
    with pytest.raises(StudyError) as caught:
        replace(StudyConfig.from_toml(default_toml()), steps=1).check_marks()
    return str(caught.value)


def _one_layer() -> torch.nn.Linear:
    layer = torch.nn.Linear(2, 2)
    convert(layer, Recipe())
    return layer


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (lambda: str(convert(torch.nn.Linear(2, 2), Recipe())), "converted 1 layer, skipped 0"),
        (lambda: str(revert(_one_layer())), "reverted 1 layer\n"),
        (lambda: str(switch(_one_layer(), input="dynamic")), "switched 1 layer;"),
        (lambda: kept_note(["a"]), "1 layer was converted"),
        (lambda: kept_note(["a", "b"]), "2 layers were converted"),
        (
            lambda: str(DamagedPart(path=Path("casts/part.parquet"), rows=1, first_step=3)),
            "1 row of steps from 3 on is missing",
        ),
        (
            lambda: str(DamagedPart(path=Path("casts/part.parquet"), rows=2, first_step=3)),
            "2 rows of steps from 3 on are missing",
        ),
        (lambda: study_notes("running", {"a": "finished", "b": "not begun"})[0], "1 of 2 runs is."),
        (lambda: study_notes("running", {"a": "not begun"})[0], "0 of 1 run is."),
        (_one_step_study, "plants nothing in 1 step,"),
    ],
)
def test_one_thing_is_not_written_as_many(said: Callable[[], str], expected: str) -> None:
    assert expected in said()
