"""The page in a real browser: it renders, complains of nothing and asks nobody for anything."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unclamp
from truths.runs import SPIKE, write_large
from unclamp import Recipe, Recorder
from unclamp.report import build_view
from unclamp.report.charts import RECOVERY, run_figure
from unclamp.report.charts import SPIKE as SPIKE_COLOUR
from unclamp.report.html import write_page
from unclamp.report.words import TABLE_COLUMNS

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def trained_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that was trained and not planted."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("page") / "run <&> 1"
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(model, folder, metadata={"arm": "delayed"}) as recorder:
        recorder.event("planted", 3)
        for step in range(8):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8) * (50 if step == 3 else 1)).square().mean()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return write_page(build_view(folder), folder / "report.html")


@pytest.fixture(scope="module")
def planted_page(planted_run: Path) -> Path:
    return write_page(build_view(planted_run), planted_run / "report.html")


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_large(tmp_path_factory.mktemp("large") / "run")
    return write_page(build_view(folder), folder / "report.html")


def names(page: Any) -> list[str]:
    """Return the names in the rows of the table of sites, as far as they are drawn."""
    return page.locator("#sites tr.site td:first-child").all_inner_texts()


def test_page_names_no_other_host_and_no_markup_of_the_log(planted_page: Path) -> None:
    text = planted_page.read_text()
    assert "<script src" not in text
    assert '<link rel="stylesheet"' not in text
    assert "run &lt;&amp;&gt; 1" in text
    assert "</script><b>" not in text


def test_spikes_are_bands_from_onset_to_end_and_lighter_until_recovery(planted_run: Path) -> None:
    run = build_view(planted_run).run
    assert run is not None
    shapes = run_figure(run).to_dict()["layout"]["shapes"]
    (band,) = [shape for shape in shapes if shape.get("fillcolor") == SPIKE_COLOUR]
    assert (band["x0"], band["x1"], band["yref"]) == (SPIKE - 0.5, SPIKE + 2.5, "y domain")
    (calm,) = [shape for shape in shapes if shape.get("fillcolor") == RECOVERY]
    assert (calm["x0"], calm["x1"]) == (SPIKE + 2.5, run.spikes[0]["recovery"])


@in_browser
def test_page_of_a_trained_run_shows_curves_heat_map_and_sites(
    trained_page: Path, tab: Any
) -> None:
    tab.goto(trained_page.as_uri())
    tab.wait_for_selector("#loss-run svg.main-svg")
    tab.wait_for_selector("#heat-run svg.main-svg")
    assert tab.locator("#sites tr.site").count() == 6
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.evaluate("document.getElementById('loss-run').data.map(t => t.name)") == [
        "loss",
        "planted",
    ]


@in_browser
def test_hovering_the_loss_names_onset_peak_and_height(planted_page: Path, tab: Any) -> None:
    tab.goto(planted_page.as_uri())
    tab.wait_for_selector("#loss-run svg.main-svg")
    said = tab.evaluate(
        "document.getElementById('loss-run').data.filter(t => t.hovertext).map(t => t.hovertext[0])"
    )
    assert any(f"onset {SPIKE}" in text and "2.5" in text for text in said)
    assert any("delayed → dynamic" in text for text in said)


@in_browser
def test_typing_filters_and_every_word_must_match(planted_page: Path, tab: Any) -> None:
    tab.goto(planted_page.as_uri())
    tab.keyboard.press("/")
    tab.keyboard.type("down inp")
    assert names(tab) == ["model.layers.0.down"]
    assert tab.locator("#count").inner_text() == "1 of 3 sites"
    tab.fill("#filter", "layers.?.d*n")
    assert names(tab) == ["model.layers.0.down"] * 2
    tab.fill("#filter", "nothing.like.it")
    assert names(tab) == []
    tab.keyboard.press("Escape")
    assert len(names(tab)) == 3
    assert tab.input_value("#filter") == ""


@in_browser
def test_role_buttons_and_clamped_filter(planted_page: Path, tab: Any) -> None:
    tab.goto(planted_page.as_uri())
    tab.get_by_role("button", name="grad_output", exact=True).click()
    assert names(tab) == ["model.layers.1.up"]
    assert tab.get_attribute("[data-role=grad_output]", "aria-pressed") == "true"
    assert "switched at step 160" in tab.locator("#sites tr.site").inner_text()
    tab.get_by_role("button", name="all", exact=True).click()
    tab.get_by_role("button", name="clamped only").click()
    assert names(tab) == ["model.layers.0.down"]


@in_browser
def test_column_heads_sort_both_ways_with_missing_values_last(planted_page: Path, tab: Any) -> None:
    def cells(key: str) -> list[str]:
        place = [column[0] for column in TABLE_COLUMNS].index(key) + 1
        return tab.locator(f"#sites tr.site td:nth-child({place})").all_inner_texts()

    tab.goto(planted_page.as_uri())
    tab.click("#sites th button[data-key=overshoot]")
    # Only one site clamped, and an overshoot is shown only where anything was.
    assert cells("overshoot") == ["2.00x", "-", "-"]
    tab.click("#sites th button[data-key=underflow_share]")
    values = cells("underflow_share")
    assert values == ["1 %", "0 %", "0 %"]
    tab.click("#sites th button[data-key=underflow_share]")
    assert cells("underflow_share") == values[::-1]
    for _ in range(2):
        tab.click("#sites th button[data-key=sqnr_db_min]")
        assert cells("sqnr_db_min") == ["20.0", "-", "-"]
    assert tab.locator("th[aria-sort=ascending]").count() == 1


@in_browser
def test_keyboard_opens_a_panel_with_the_range_on_a_log_axis(planted_page: Path, tab: Any) -> None:
    tab.goto(planted_page.as_uri())
    tab.keyboard.press("/")
    tab.keyboard.type("down")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_selector("#panel-range svg.main-svg")
    assert tab.locator("#panel-title").inner_text() == "model.layers.0.down input"
    assert tab.get_attribute("#sites", "aria-activedescendant") == "row-0"
    drawn = tab.evaluate("""() => { const p = document.getElementById('panel-range');
        return {log: p.layout.yaxis.type, names: p.data.map(t => t.name),
                amax: p.data.find(t => t.name === 'amax').y[148],
                top: p.data.find(t => t.name === 'largest representable').y[148],
                clamp: p.data.find(t => t.name === 'clamped').y[148]}; }""")
    assert drawn["log"] == "log"
    assert {"amax", "largest representable", "smallest subnormal", "clamped", "underflow",
            "SQNR mean"} <= set(drawn["names"])  # fmt: skip
    assert (drawn["amax"], drawn["top"], drawn["clamp"]) == (896.0, 448.0, 0.005)
    bars = tab.evaluate("""() => { const p = document.getElementById('panel-exponents');
        return {x: p.data[0].x, latest: p.data[0].y, total: p.data[1].y,
                edges: p.layout.shapes.filter(s => s.type === 'line').map(s => s.x0)}; }""")
    assert bars["x"] == [-2.5, 6.5]
    assert bars["latest"] == pytest.approx([600 / 1050, 450 / 1050])
    assert bars["total"] == pytest.approx([2400 / 3900, 1500 / 3900])
    assert bars["edges"] == pytest.approx([-9, 8.8074], abs=1e-3)
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    assert tab.locator("#panel").is_hidden()


@in_browser
def test_a_click_opens_a_panel_and_says_where_there_is_no_histogram(
    planted_page: Path, tab: Any
) -> None:
    tab.goto(planted_page.as_uri())
    tab.locator("#sites tr.site").nth(2).click()
    tab.wait_for_selector("#panel-range svg.main-svg")
    assert "no histogram" in tab.locator("#panel-exponents").inner_text()
    tab.get_by_role("button", name="close").click()
    assert tab.locator("#panel").is_hidden()


@in_browser
def test_1680_sites_stay_usable(large_page: Path, tab: Any) -> None:
    """Few rows exist at a time, and all can be reached. The time is printed, not judged."""
    tab.goto(large_page.as_uri())
    assert tab.locator("#count").inner_text() == "1,680 of 1,680 sites"
    assert tab.locator("#sites tr.site").count() < 100
    tab.focus("#sites")
    tab.keyboard.press("ArrowUp")  # the last one
    tab.wait_for_selector("#row-1679")
    assert tab.locator("#sites tr[aria-selected=true] td").first.inner_text() == (
        "model.layers.79.d"
    )
    tab.keyboard.press("Enter")
    assert "--site 'model.layers.79.d grad_output'" in tab.locator("#panel-text").inner_text()
    times = []
    for text in ("d", "79.", "layers.1* input", ""):
        tab.fill("#filter", text)
        times.append(float(tab.get_attribute("#sites", "data-update-ms")))
    print(f"filtering 1,680 sites: {max(times):.1f} ms at most")
    tab.fill("#filter", "layers.79. grad")
    assert tab.locator("#sites tr.site").count() == 7


@in_browser
def test_a_phone_needs_no_sideways_scrolling_of_the_page(planted_page: Path, tab: Any) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.goto(planted_page.as_uri())
    tab.locator("#sites tr.site").first.click()
    tab.wait_for_selector("#panel-exponents svg.main-svg")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
