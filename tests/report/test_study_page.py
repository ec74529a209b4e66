"""A study's page in a real browser: the answer first, by keyboard, on a phone, in the dark."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truths.runs import write_planted
from truths.studies import PLANTED, STEPS, study
from unclamp.report import build_view
from unclamp.report.glossary import GLOSSARY
from unclamp.report.html import write_page
from unclamp.report.recorded import read_run
from unclamp.report.verdict import study_verdict
from unclamp.runlog import RunLog


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study in which delayed scaling is hurt at the planted steps."""
    folder = tmp_path_factory.mktemp("study")
    run = write_planted(folder / "run", steps=STEPS)
    with RunLog.open(run) as log:
        record, _ = read_run(log)
    arms = {"hp": 1.0, "dynamic": 1.0, "delayed": 2.4, "a_name_that_is_rather_long": 1.0}
    scenarios = [study(record, arms), study(record, arms, planted=False)]
    view = replace(build_view(run), run=None, scenarios=scenarios,
                   verdict=study_verdict(scenarios), notes=["A note."])  # fmt: skip
    return write_page(view, folder / "report.html")


def focused(tab: Any) -> str:
    return tab.evaluate("""() => { const e = document.activeElement;
        return e.id || e.getAttribute('aria-label') || e.textContent.trim(); }""")


def contrast(tab: Any, ink: str, paper: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (ink, paper)))
    return (high + 0.05) / (low + 0.05)


def style(tab: Any, selector: str, name: str) -> str:
    return tab.eval_on_selector(selector, f"e => getComputedStyle(e).{name}")


def test_the_verdict_then_the_picture_then_the_table(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_selector("#loss-0 svg.main-svg")
    assert tab.evaluate("[...document.body.children].slice(0, 3).map(e => e.id || e.className || "
                        "e.tagName)") == ["H1", "verdict", "warn"]  # fmt: skip
    first = tab.locator("#verdict li").first.inner_text()
    assert first.startswith("delayed is hurt where an amax outruns its history")
    order = tab.evaluate("""() => [...document.querySelectorAll(
        '#verdict, #outlier #loss-0, #outlier table.arms, #glossary, #heat-0-0, #text #loss-1')]
        .map(e => e.id || e.className)""")
    assert order == ["verdict", "loss-0", "arms", "glossary", "heat-0-0", "loss-1"]


def test_differences_share_the_axis_of_the_losses_and_planted_lines_cross_both(
    page: Path, tab: Any
) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_selector("#loss-0 svg.main-svg")
    drawn = tab.evaluate("""() => { const p = document.getElementById('loss-0'); return {
        below: [...new Set(p.data.filter(t => t.yaxis === 'y2' && t.name).map(t => t.name))],
        axes: [...new Set(p.data.map(t => t.xaxis || 'x'))],
        lines: p.layout.shapes.map(s => [s.x0, s.yref]),
        range: p.layout.yaxis2.range }; }""")
    assert drawn["below"] == ["hp", "delayed", "a_name_that_is_rather_long"]
    assert drawn["axes"] == ["x"]
    assert drawn["lines"] == [[step, "paper"] for step in PLANTED]
    assert 0.001 < drawn["range"][1] < 0.1  # the arms' noise is 0.001, the planted rise 4


def test_heat_maps_have_planted_and_spike_lines(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_selector("#heat-0-0 svg.main-svg")
    found = tab.evaluate("""() => { const p = document.getElementById('heat-0-0'); return {
        lines: p.layout.shapes.map(s => [s.x0, s.line.color]), range: p.layout.xaxis.range,
        rows: p.data[0].y, title: p.data[0].colorbar.title.text }; }""")
    planted = [[step, "#9ca3af"] for step in PLANTED]
    assert found["lines"] == planted + [[step, "#ef4444"] for step in PLANTED]
    assert found["range"] == [-0.5, STEPS - 0.5]
    assert found["rows"] == ["layers.0.down input"]
    assert found["title"] == "clamped<br>share"


def test_tab_reaches_headings_that_lead_to_their_meaning(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_selector("#loss-0 svg.main-svg")
    assert tab.locator("#glossary dl").is_hidden()
    seen = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        seen.append(focused(tab))
        if seen[-1] == "largest overshoot":
            break
    assert "Loss of each arm over the steps, outlier" in seen
    assert "Table of arms, outlier" in seen
    assert seen[-1] == "largest overshoot"
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#glossary[open]")
    assert focused(tab) == "term-overshoot"
    meaning = next(term.meaning for term in GLOSSARY if term.word == "overshoot")
    assert meaning in tab.locator("#term-overshoot").inner_text()
    assert tab.get_attribute("#outlier th a[href='#term-overshoot']", "title") == meaning
    words = tab.locator("#glossary dt").all_inner_texts()
    assert {"hp", "arm", "site", "cast", "clamped", "clamp error", "re-cast", "spike", "planted",
            "baseline", "underflow", "difference"} <= set(words)  # fmt: skip
    assert "SQNR" not in words  # it is on the page of a run


def test_keys_open_the_glossary_and_reach_the_heat_map(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_selector("#heat-0-0 svg.main-svg")
    tab.focus("#glossary summary")
    tab.keyboard.press("Enter")
    assert tab.locator("#glossary dl").is_visible()
    for _ in range(5):
        tab.keyboard.press("Tab")
        if focused(tab).startswith("Clamped share of delayed"):
            break
    assert focused(tab).startswith("Clamped share of delayed, sites by steps, outlier")
    tab.wait_for_function("""() => { const r = document.activeElement.getBoundingClientRect();
        return r.top < innerHeight && r.bottom > 0; }""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_no_sideways_scrolling_and_readable_text(
    page: Path, tab: Any, width: int, scheme: str
) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector("#heat-0-0 svg.main-svg")
    tab.locator("#glossary summary").click()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    paper = style(tab, "body", "backgroundColor")
    for selector in ("body", ".soft", "th", "dd"):
        assert contrast(tab, style(tab, selector, "color"), paper) >= 4.5
    text = tab.evaluate("getComputedStyle(document.querySelector('#loss-0 .xtick text')).fill")
    assert contrast(tab, text, paper) >= 4.5
    for name in ("#loss-0 .main-svg", "#heat-0-0 .main-svg"):
        box = tab.locator(name).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_plots_follow_the_scheme_when_it_changes(page: Path, tab: Any) -> None:
    tab.emulate_media(color_scheme="light")
    tab.goto(page.as_uri())
    tab.wait_for_selector("#heat-0-0 svg.main-svg")
    state = """() => { const p = document.getElementById('heat-0-0');
        return [p.layout.font.color, p.data[0].colorscale[0][1],
                getComputedStyle(document.body).backgroundColor]; }"""
    light = tab.evaluate(state)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"({state})()[0] !== '{light[0]}'")
    dark = tab.evaluate(state)
    assert light[2] == "rgb(255, 255, 255)"
    assert [a == b for a, b in zip(light, dark, strict=True)] == [False] * 3
    for _, colour, paper in (light, dark):  # the smallest share can be told from the page
        assert contrast(tab, colour, paper) >= 1.6
    tab.emulate_media(color_scheme="light")
    tab.wait_for_function(f"({state})()[0] === '{light[0]}'")
    assert tab.evaluate(state) == light


def test_on_a_phone_the_legend_is_below_and_comes_back_above(page: Path, tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector("#loss-0 .legend")
    places = """() => { const box = (s) => document.querySelector('#loss-0 ' + s)
        .getBoundingClientRect(); return [box('.legend').top, box('.xtitle').bottom,
        box('.legend').bottom, box('.main-svg').bottom]; }"""
    legend, title, end, plot = tab.evaluate(places)
    assert legend >= title - 1
    assert end <= plot + 1
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.wait_for_function(f"(([a, b]) => a < b)(({places})())")
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.wait_for_function(f"(([a, b]) => a >= b - 1)(({places})())")
