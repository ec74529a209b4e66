"""`unclamp report` of several paths: what is compared, where the page goes, and bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from truths.sides import DYNAMIC, noisy, write_side
from unclamp.cli import app
from unclamp.errors import RunLogError, UnclampError
from unclamp.study.config import StudyConfig, default_toml, write_study

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two arms of three seeds each, one of which clamps and spikes."""
    root = tmp_path_factory.mktemp("sides") / "runs"
    for seed in range(3):
        losses = noisy(seed, steps=120, jitter=0.01)
        losses[100:103] = [9.0 + seed] * 3
        clamped = {f"layers.{i}.down": {100 + i % 3: (5 + i, 0.5 / (i + 1))} for i in range(20)}
        about = {"seed": seed}
        write_side(root / "delayed" / f"seed-{seed}", losses, casts=clamped, metadata=about)
        calm = {name: {} for name in clamped}
        other = noisy(seed, steps=120)
        write_side(
            root / "dynamic" / f"seed-{seed}", other, casts=calm, recipe=DYNAMIC, metadata=about
        )
    return root


@pytest.fixture
def runs(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that a test may write to, in a working directory of its own."""
    shutil.copytree(written, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def report(*arguments: object, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": str(width)})


def refused(*arguments: object) -> str:
    """Return the message of a command that must end with an error of the user's."""
    done = report(*arguments)
    assert isinstance(done.exception, UnclampError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def document(*arguments: object) -> dict[str, Any]:
    done = report(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def write_tiny_study(path: Path) -> Path:
    data = StudyConfig.from_toml(default_toml()).to_dict()
    path.mkdir()
    write_study(path, StudyConfig.from_dict(data), status="finished")
    return path


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_begins_with_the_verdict_and_fits(runs: Path, width: int) -> None:
    done = report(*sorted(runs.glob("*/*")), "--baseline", "dynamic", width=width)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= width  # the last one is the page's path
    assert lines[2].startswith("· Against dynamic, the loss at the end is ")
    text = " ".join(done.stdout.split())
    assert text.index("the loss at the end") < text.index("limits") < text.index("what differs")
    assert "Spikes of the losses of delayed and dynamic over 3 pairs: 3 in delayed alone" in text
    assert "recipe input, weight: dynamic → delayed (history_len 16)" in text
    assert "and 8 more that clamped: --json" in text
    assert "…" not in text


def test_the_page_is_where_the_user_works_and_is_named(runs: Path) -> None:
    done = report(*sorted(runs.glob("*/*")))
    page = Path("compare.html")
    assert page.is_file()
    assert f"The page: {page.resolve()}" in done.stdout
    assert not list(runs.rglob("*.html"))


def test_json_has_all_sites_and_is_strict(runs: Path) -> None:
    found = document(*sorted(runs.glob("*/*")), "--out", "here.html")
    assert (found["page"], found["baseline"]) == ("here.html", "delayed")
    assert Path("here.html").is_file()
    assert len(found["sites"]) == 20
    differences = [row["difference"] for row in found["sites"]]
    assert differences == sorted(differences, reverse=True)
    assert found["sites"][0]["fqn"] == "layers.0.down"
    assert found["verdict"][0].startswith("Against delayed, the loss at the end is")


def test_the_page_replaces_no_file_that_another_wrote(runs: Path) -> None:
    one, other = runs / "delayed" / "seed-0", runs / "dynamic" / "seed-0"
    page, mine = Path("compare.html"), "<html>a page of my own</html>"
    page.write_text(mine)
    said = CliRunner().invoke(app, ["report", str(one), str(other), "--json"])
    assert said.exit_code == 0, said.output
    assert page.read_text() == mine
    assert json.loads(said.stdout)["page"] == "compare-2.html"
    assert "2 runs side by side" in Path("compare-2.html").read_text()
    for paths in ([one, other], [one]):
        done = CliRunner().invoke(app, ["report", *map(str, paths), "--out", str(page)])
        assert isinstance(done.exception, UnclampError)
        assert "is no page that unclamp wrote" in str(done.exception)
        assert page.read_text() == mine
    again = CliRunner().invoke(app, ["report", str(one), "--out", "compare-2.html"])
    assert again.exit_code == 0, again.output
    assert "Run seed-0" in Path("compare-2.html").read_text()


def test_a_folder_of_runs_is_compared(runs: Path) -> None:
    found = document(runs)
    assert list(found["arms"]) == ["delayed", "dynamic"]
    assert found["limits"][0].startswith("Paired by seed")


def test_a_study_among_runs_is_left_out_and_said(runs: Path) -> None:
    write_side(write_tiny_study(runs / "study") / "text" / "a" / "seed-0", [1.0])
    found = document(runs)
    assert list(found["arms"]) == ["delayed", "dynamic"]
    assert found["limits"][0].startswith("runs/study is a study and was left out")


def test_of_very_many_runs_the_newest_are_compared(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(14):
        created = f"2026-01-{20 - i:02}T00:00:00+00:00"
        write_side(Path(f"many/run-{i:02}"), [1.0, 2.0], casts={}, created=created)
    found = document("many")
    assert [row["name"] for row in found["runs"]] == [f"run-{i:02}" for i in range(12)]
    assert found["limits"][0].startswith("many holds 14 runs: the 12 newest are compared.")


def test_flags_decide_on_pairs(runs: Path) -> None:
    one = sorted(runs.glob("*/seed-0"))
    assert document(*one)["differences"][0]["design"] == "paired"
    found = document(*one, "--unpaired")["differences"][0]
    assert (found["design"], found["how"]) == ("unpaired", "Not paired, as you said.")
    assert document(*one, "--paired")["differences"][0]["how"] == "Paired by seed, as you said."


def test_a_run_that_goes_on_is_compared(runs: Path) -> None:
    header = runs / "delayed" / "seed-0" / "run.json"
    header.write_text(header.read_text().replace('"finished"', '"running"'))
    found = document(*sorted(runs.glob("*/seed-0")))
    assert any("last record" in line for line in found["limits"])


def test_a_single_run_has_its_own_page_and_may_have_it_elsewhere(runs: Path) -> None:
    run = runs / "delayed" / "seed-0"
    assert "run" in document(run)
    assert (run / "report.html").is_file()
    assert document(run, "--out", "own.html")["page"] == "own.html"
    assert Path("own.html").is_file()


def test_bad_input_is_one_line_that_says_what_to_do(runs: Path) -> None:
    one, other = sorted(runs.glob("*/seed-0"))
    study = write_tiny_study(Path("study"))
    Path("notes").mkdir()
    assert "was given 2 times" in refused(one, other, runs / "delayed" / "." / "seed-0")
    assert "study is a study, whose arms `unclamp report study` compares" in refused(one, study)
    assert "notes is not a run" in refused(one, "notes")
    assert "missing does not exist" in refused(one, "missing")
    assert "no arm and no run is called 'nope'" in refused(one, other, "--baseline", "nope")
    assert "--site is for the page of one run" in refused(one, other, "--site", "*")
    assert "--baseline is for several runs" in refused(one, "--baseline", "x")
    assert "--paired is for several runs" in refused(one, "--unpaired")
    assert "is the page of one of these runs" in refused(one, other, "--out", one / "report.html")
    assert "cannot write" in refused(one, other, "--out", "missing/page.html")
    assert "is not a run" in refused("notes")
    for run in (one, other):
        (run / "run.json").write_text((run / "run.json").read_text().replace(": 2,", ": 99,"))
        broken = json.loads((run / "run.json").read_text()) | {"schema_version": 99}
        (run / "run.json").write_text(json.dumps(broken))
    with pytest.raises(RunLogError, match="none of the runs can be read"):
        raise report(one, other).exception or AssertionError


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_shows_verdict_limits_losses_and_sites(runs: Path, browser: Any) -> None:
    found = document(*sorted(runs.glob("*/*")), "--baseline", "dynamic")
    for width in (1440, 390):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        complaints: list[str] = []
        tab.on("pageerror", lambda error, said=complaints: said.append(str(error)))
        tab.on("request", lambda r, said=complaints: None if r.url.startswith(("file:", "data:"))
               else said.append(r.url))  # fmt: skip
        tab.goto(Path("compare.html").resolve().as_uri())
        tab.wait_for_selector("#losses .ylabel, #losses .g-ytitle, #losses .ytitle")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("#verdict li").all_inner_texts() == found["verdict"]
        order = [tab.locator(at).first.bounding_box()["y"]
                 for at in ("#verdict", "#limits", "#losses", "table.differences", "#runs",
                            "#settings", "table.sites-of-arms")]  # fmt: skip
        assert order == sorted(order)
        assert tab.locator("#losses .y2title").count() == 1
        assert tab.locator("table.sites-of-arms td.site").count() == 20
        drawn = tab.evaluate(
            "document.getElementById('losses').data.filter(t => t.mode == 'lines' && t.name)"
            ".map(t => [t.name, t.yaxis])"
        )
        assert drawn == [["dynamic", "y"], ["delayed", "y"], ["delayed", "y2"]]
        assert complaints == []
        tab.close()
