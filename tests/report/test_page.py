"""The page in a real browser: it renders, complains of nothing and asks nobody for anything."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Recipe, Recorder
from unclamp.report import build_view
from unclamp.report.html import write_page

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_page_names_no_other_host(page_path: Path) -> None:
    text = page_path.read_text()
    assert "<script src" not in text
    assert '<link rel="stylesheet"' not in text
    assert "run &lt;&amp;&gt; 1" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_page_renders_without_errors_or_requests(page_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    complaints: list[Any] = []
    requests: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_path.as_uri())
        page.wait_for_selector("#loss-run svg.main-svg")
        page.wait_for_selector("#heat-run-delayed svg.main-svg")
        assert page.locator("table.arms tbody tr").count() == 1
        assert page.locator("table.sites tbody tr").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
